"""SB3's contract, line by line, for EGGROLL with both policies, and for sb3-contrib's ARS beside it.

What ARS does not keep is marked, strictly: a mark that is no longer right fails. ``python tests/contract_table.py``
writes the table in the docs from what these tests say.
"""

import io
import json
import zipfile

import numpy as np
import optuna
import pytest
import torch
import toy
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from sb3_contrib import ARS
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecTransposeImage

from eggroll_rl import EGGROLL

ALGORITHMS = {
    "EGGROLL, MlpPolicy": (EGGROLL, "MlpPolicy", {"population_size": 8, "n_workers": 0}),
    "EGGROLL, LinearPolicy": (EGGROLL, "LinearPolicy", {"population_size": 8, "n_workers": 0}),
    "ARS, MlpPolicy": (ARS, "MlpPolicy", {"n_delta": 4}),
}
GENERATION = 8 * 7  # env steps of a generation of any of them, about


def line(*, not_ars=None):
    """Run a test for all algorithms; ``not_ars`` says why ARS fails it."""
    fails = pytest.mark.xfail(reason=not_ars or "", strict=True)
    ours = pytest.mark.promise("R30")
    marks = {"ARS, MlpPolicy": fails if not_ars else ()}
    params = [pytest.param(name, id=name, marks=marks.get(name, ours)) for name in ALGORITHMS]
    return pytest.mark.parametrize("name", params)


def make(name, env=None, **settings):
    algorithm, policy, small = ALGORITHMS[name]
    return algorithm(policy, one_env() if env is None else env, **{"seed": 0, **small, **settings})


def load(name, path, **kwargs):
    return ALGORITHMS[name][0].load(path, **kwargs)


def one_env(n_envs=1, **kwargs):
    return make_vec_env(toy.make_target, n_envs, seed=0, **kwargs)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()]).numpy().copy()


class Recorder(BaseCallback):
    def __init__(self, stop_at=None):
        super().__init__()
        self.events, self.seen, self.stop_at = [], [], stop_at

    def _on_training_start(self):
        self.events.append("training_start")
        self.started_with = dict(self.locals)

    def _on_rollout_start(self):
        self.events.append("rollout_start")

    def _on_step(self):
        self.seen.append((self.num_timesteps, dict(self.locals), parameters(self.model)))
        return self.stop_at is None or self.num_timesteps < self.stop_at

    def _on_rollout_end(self):
        self.events.append("rollout_end")

    def _on_training_end(self):
        self.events.append("training_end")


# Constructor -----------------------------------------------------------------------------------------------


@line(not_ars="stats_window_size has no effect: the episodes are those of the last iteration")
def test_constructor_takes_what_all_algorithms_take(name):
    """The constructor takes learning_rate, policy_kwargs, stats_window_size, verbose, seed and device."""
    kwargs = {} if "Linear" in name else {"policy_kwargs": {"net_arch": [8]}}
    kwargs |= {"learning_rate": 0.01, "stats_window_size": 7}
    model = make(name, verbose=0, seed=3, device="cpu", **kwargs)
    assert model.ep_info_buffer is None and model.seed == 3
    model.learn(1)
    assert model.ep_info_buffer.maxlen == 7 and (
        "policy_kwargs" not in kwargs or len(parameters(model)) == 3 * 8 + 8 + 8 * 2 + 2
    )


@line()
def test_env_is_an_id_an_env_or_a_vec_env(name):
    """env is an id, a Gymnasium env or a VecEnv."""
    for env in ("CartPole-v1", toy.make_target(), DummyVecEnv([toy.make_target])):
        model = make(name, env)
        model.learn(1)
        assert model.num_timesteps > 0 and model.get_env().num_envs == 1


@line()
def test_several_envs(name):
    """A VecEnv of several envs works, and a callback is called once per step of it."""
    recorder = Recorder()
    make(name, one_env(3)).learn(2 * GENERATION, callback=recorder)
    steps = [step for step, *_ in recorder.seen]
    assert set(np.diff(steps)) <= {1, 2, 3} and len(steps) < steps[-1] / 2


@line()
def test_unsupported_action_spaces_are_refused(name):
    """An action space that is not supported, or has infinite bounds, is refused at once."""

    class Env(toy.TargetEnv):
        action_space = spaces.Dict(a=spaces.Discrete(2))

    class Unbounded(toy.TargetEnv):
        action_space = spaces.Box(-np.inf, np.inf, (2,))

    for env in (Env(), Unbounded()):
        with pytest.raises((AssertionError, ValueError)):
            make(name, TimeLimit(env, 20))


@line()
def test_policies_have_short_names(name):
    """policy_aliases maps MlpPolicy and LinearPolicy; an unknown name is refused."""
    assert {"MlpPolicy", "LinearPolicy"} <= set(ALGORITHMS[name][0].policy_aliases)
    with pytest.raises(ValueError, match="Polisy"):
        ALGORITHMS[name][0]("MlpPolisy", one_env())


# Saving and loading ----------------------------------------------------------------------------------------


@line()
def test_a_loaded_model_predicts_the_same(name, tmp_path):
    """load() gives a model that predicts the same, with the same counters."""
    model = make(name).learn(3 * GENERATION)
    model.save(tmp_path / "model")
    loaded = load(name, tmp_path / "model")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(model.predict(obs)[0], loaded.predict(obs)[0])
    assert loaded.num_timesteps == model.num_timesteps and loaded._n_updates == model._n_updates


@line()
def test_load_takes_changed_hyper_parameters(name, tmp_path):
    """load(**kwargs) changes hyper-parameters."""
    make(name).save(tmp_path / "model")
    changed = load(name, tmp_path / "model", env=one_env(), learning_rate=0.5, stats_window_size=3)
    changed.learn(1)
    assert changed.lr_schedule(1.0) == 0.5


@line()
def test_load_takes_custom_objects(name, tmp_path):
    """load(custom_objects=...) puts them in place of what was saved, as RL Zoo's enjoy does."""
    make(name).save(tmp_path / "model")
    zoo = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    load(name, tmp_path / "model", custom_objects=zoo, device="auto", seed=1).predict(np.zeros(3, np.float32))


@line()
def test_load_can_print_the_system(name, tmp_path, capsys):
    """load(print_system_info=True) prints where the model was saved and where it is loaded."""
    make(name).save(tmp_path / "model")
    load(name, tmp_path / "model", print_system_info=True)
    assert "CURRENT SYSTEM INFO" in capsys.readouterr().out


@line(not_ars="load() sets its weights anew; with zero_policy=False it goes on from others than were saved")
def test_training_goes_on_from_the_loaded_parameters(name, tmp_path):
    """Training goes on from the loaded parameters, as if it had not been interrupted."""
    fresh = {} if "EGGROLL" in name else {"zero_policy": False}
    model = make(name, **fresh).learn(3 * GENERATION)
    model.save(tmp_path / "model")
    loaded = load(name, tmp_path / "model", env=one_env())
    before = parameters(loaded)
    loaded.learning_rate = 1e-12
    loaded._setup_lr_schedule()
    loaded.learn(1, reset_num_timesteps=False)
    assert np.allclose(parameters(loaded), before, atol=1e-6)


@line()
def test_the_zip_has_sb3s_members(name, tmp_path):
    """The zip holds data, policy.pth, pytorch_variables.pth, _stable_baselines3_version and system_info.txt."""
    make(name).learn(1).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        members = {"data", "policy.pth", "pytorch_variables.pth", "_stable_baselines3_version", "system_info.txt"}
        assert members <= set(file.namelist())
        data = json.loads(file.read("data"))
    assert {"policy_class", "observation_space", "action_space", "verbose", "policy_kwargs", "n_envs"} <= set(data)


@line()
def test_save_and_load_take_file_objects(name):
    """save() and load() take open files."""
    file = io.BytesIO()
    model = make(name)
    model.save(file)
    file.seek(0)
    assert np.array_equal(parameters(load(name, file)), parameters(model))


@line()
def test_get_and_set_parameters(name):
    """set_parameters(get_parameters()) changes nothing; with exact_match a missing name is refused."""
    model, other = make(name).learn(2 * GENERATION), make(name, seed=1)
    other.set_parameters(model.get_parameters())
    assert np.array_equal(parameters(model), parameters(other))
    with pytest.raises(ValueError, match="policy"):
        other.set_parameters({}, exact_match=True)


@line()
def test_set_env_checks_the_spaces(name):
    """set_env() takes another env with the same spaces and refuses others."""
    model = make(name)
    model.set_env(one_env())
    model.learn(1)
    with pytest.raises(ValueError, match="[Ss]paces"):
        model.set_env(make_vec_env("CartPole-v1"))


# learn() ---------------------------------------------------------------------------------------------------


@line()
def test_total_timesteps_is_a_lower_bound(name):
    """learn(total_timesteps) makes at least as many steps, and returns the model."""
    model = make(name)
    assert model.learn(GENERATION + 1) is model and model.num_timesteps >= GENERATION + 1


@line()
def test_learn_twice_starts_the_count_again_or_goes_on(name):
    """A second learn() starts the count again, with reset_num_timesteps=False it goes on."""
    model = make(name).learn(3 * GENERATION)
    first = model.num_timesteps
    model.learn(GENERATION, reset_num_timesteps=False)
    assert model.num_timesteps >= first + GENERATION
    model.learn(1)
    assert model.num_timesteps < first


@line(not_ars="progress is measured on the argument, and falls below 0 when a run goes on")
def test_progress_stays_between_one_and_zero(name):
    """The progress that schedules see falls from 1 to 0, when a run goes on too."""
    seen = []

    class Schedule:
        def __call__(self, progress):
            seen.append(progress)
            return 0.01

    model = make(name, learning_rate=Schedule()).learn(4 * GENERATION)
    model.learn(4 * GENERATION, reset_num_timesteps=False)
    assert max(seen) == 1.0 and min(seen) >= 0.0 and len(set(seen)) > 4


@line()
def test_schedules_may_be_functions_and_survive_saving(name, tmp_path):
    """learning_rate takes a schedule, which is saved with the model."""
    model = make(name, learning_rate=LinearSchedule(0.02, 0.01, 1.0)).learn(1)
    model.save(tmp_path / "model")
    assert load(name, tmp_path / "model").lr_schedule(0.5) == pytest.approx(0.015)


@line()
def test_the_same_seed_gives_the_same_agent(name):
    """The same seed gives the same agent."""
    first, second, other = (make(name, seed=seed).learn(3 * GENERATION) for seed in (0, 0, 1))
    assert np.array_equal(parameters(first), parameters(second))
    assert not np.array_equal(parameters(first), parameters(other))


# Callbacks -------------------------------------------------------------------------------------------------


@line()
def test_callbacks_are_called_in_order(name):
    """A callback hears of the start, of each rollout's start and end, and of the end, in this order."""
    recorder = Recorder()
    make(name).learn(2 * GENERATION, callback=recorder)
    rollouts = recorder.events[1:-1]
    assert recorder.events[0] == "training_start" and recorder.events[-1] == "training_end"
    assert rollouts[:2] == ["rollout_start", "rollout_end"] and rollouts[::2] == ["rollout_start"] * (
        len(rollouts) // 2
    )
    assert {"total_timesteps", "tb_log_name"} <= set(recorder.started_with)


@line(not_ars="locals are never updated")
def test_callbacks_find_dones_and_infos(name):
    """At each step a callback finds dones and infos among its locals."""
    recorder = Recorder()
    make(name, one_env(2)).learn(GENERATION, callback=recorder)
    assert all(len(found["dones"]) == len(found["infos"]) == 2 for _, found, _ in recorder.seen)
    episodes = [info["episode"] for _, found, _ in recorder.seen for info in found["infos"] if "episode" in info]
    assert len(episodes) >= 8 and {"r", "l", "t"} <= set(episodes[0])


@line(not_ars="what on_step() returns is ignored")
def test_a_callback_that_says_stop_stops(name):
    """on_step() returning False ends the run at this step."""
    model = make(name)
    model.learn(100 * GENERATION, callback=Recorder(stop_at=30))
    assert model.num_timesteps == 30


@line(not_ars="what on_step() returns is ignored")
def test_a_function_is_a_callback(name):
    """A function is a callback, and stops the run by returning False."""
    model = make(name)
    model.learn(100 * GENERATION, callback=lambda locals_, globals_: False)
    assert model.num_timesteps == 1


@line(not_ars="locals are never updated")
def test_stop_training_on_max_episodes(name):
    """StopTrainingOnMaxEpisodes stops."""
    model = make(name)
    model.learn(100 * GENERATION, callback=StopTrainingOnMaxEpisodes(5))
    assert len(model.ep_info_buffer) == 5


@line(not_ars="what on_step() returns is ignored")
@pytest.mark.parametrize("kind", ["threshold", "no improvement"])
def test_stop_training_by_evaluation(name, kind):
    """StopTrainingOnRewardThreshold and StopTrainingOnNoModelImprovement stop, under an EvalCallback."""
    stop = {
        "threshold": {"callback_on_new_best": StopTrainingOnRewardThreshold(-1e9)},
        "no improvement": {"callback_after_eval": StopTrainingOnNoModelImprovement(0, min_evals=1)},
    }[kind]
    model = make(name)
    model.learn(30 * GENERATION, callback=EvalCallback(one_env(), eval_freq=20, n_eval_episodes=1, verbose=0, **stop))
    assert model.num_timesteps < 20 * GENERATION


@line(not_ars="what on_step() returns is ignored")
def test_optuna_prunes(name):
    """An EvalCallback that reports to an Optuna trial ends a run that is pruned."""
    trial = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(lower=1e9)).ask()

    class TrialEvalCallback(EvalCallback):
        def _on_step(self):
            super()._on_step()
            if self.n_calls % self.eval_freq == 0:
                trial.report(self.last_mean_reward, self.n_calls)
                return not trial.should_prune()
            return True

    model = make(name).learn(3 * GENERATION, TrialEvalCallback(one_env(), eval_freq=10, n_eval_episodes=1, verbose=0))
    assert trial.should_prune() and model.num_timesteps == 10


@line()
def test_every_n_timesteps_and_log_every_n_timesteps(name, tmp_path):
    """EveryNTimesteps and LogEveryNTimesteps come as often as they say."""
    model, recorder = make(name), Recorder()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(400, callback=[EveryNTimesteps(100, recorder), LogEveryNTimesteps(100)], log_interval=None)
    model.logger.close()
    assert 4 <= len(recorder.seen) <= model.num_timesteps // 100 + 1
    assert len((tmp_path / "progress.csv").read_text().splitlines()) > 4


@line()
def test_checkpoint_callback(name, tmp_path):
    """CheckpointCallback writes models at the steps that it names, and they load."""
    make(name).learn(450, callback=CheckpointCallback(200, str(tmp_path), verbose=0))
    assert {path.name for path in tmp_path.glob("*.zip")} >= {"rl_model_200_steps.zip", "rl_model_400_steps.zip"}
    assert load(name, tmp_path / "rl_model_400_steps").num_timesteps == 400


@line()
def test_eval_callback(name, tmp_path):
    """EvalCallback evaluates as often as eval_freq says, and writes evaluations.npz and a best_model.zip that loads."""
    to = {"log_path": str(tmp_path), "best_model_save_path": str(tmp_path)}
    evaluation = EvalCallback(one_env(), eval_freq=150, n_eval_episodes=2, verbose=0, **to)
    make(name).learn(600, callback=evaluation)
    found = np.load(tmp_path / "evaluations.npz")
    assert found["timesteps"].tolist()[:3] == [150, 300, 450] and found["results"].shape[1] == 2
    assert load(name, tmp_path / "best_model").predict(np.zeros(3, np.float32))


@line()
def test_lists_of_callbacks(name):
    """A list of callbacks and a CallbackList work."""
    first, second, third = Recorder(), Recorder(), Recorder()
    make(name).learn(GENERATION, callback=[first, CallbackList([second, third])])
    assert len(first.seen) == len(second.seen) == len(third.seen) > 0


@line()
def test_the_policy_is_the_mean_while_callbacks_run(name):
    """While callbacks run, the policy holds the parameters of the mean."""
    recorder = Recorder()
    model = make(name)
    model.learn(1, callback=recorder)
    assert all(np.array_equal(seen, recorder.seen[0][2]) for *_, seen in recorder.seen)


@line(not_ars="needs rich beside tqdm")
def test_progress_bar(name, capsys, monkeypatch):
    """progress_bar=True works with nothing more than tqdm."""
    monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", None)  # as where rich is missing
    make(name).learn(GENERATION, progress_bar=True)
    assert "steps" in capsys.readouterr().err


# Logs ------------------------------------------------------------------------------------------------------


@line()
@pytest.mark.parametrize("output", ["stdout", "log", "csv", "json", "tensorboard"])
def test_logger_outputs(name, output, tmp_path, capsys):
    """The logger writes stdout, log, csv, json and tensorboard, with the usual keys."""
    if output == "tensorboard":
        pytest.importorskip("tensorboard")
    model = make(name)
    model.set_logger(configure(str(tmp_path), [output]))
    model.learn(3 * GENERATION)
    model.logger.close()
    written = capsys.readouterr().out + "".join(p.read_bytes().decode("latin-1") for p in tmp_path.iterdir())
    for key in ("ep_rew_mean", "ep_len_mean", "learning_rate"):
        assert key in written
    if output != "tensorboard":
        assert all(key in written for key in ("total_timesteps", "time_elapsed"))


@line()
def test_tensorboard_folders(name, tmp_path):
    """tensorboard_log makes a folder per learn(), and goes on in the same one with reset_num_timesteps=False."""
    pytest.importorskip("tensorboard")
    model = make(name, tensorboard_log=str(tmp_path))
    model.learn(1, tb_log_name="run")
    model.learn(1, tb_log_name="run", reset_num_timesteps=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run_1"]
    model.learn(1, tb_log_name="run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_1", "run_2"]


@line()
def test_monitor_files(name, tmp_path):
    """Monitor files are written, and load_results() reads them."""
    env = one_env(monitor_dir=str(tmp_path))
    make(name, env).learn(3 * GENERATION)
    env.close()
    assert len((tmp_path / "0.monitor.csv").read_text().splitlines()) > 8
    pytest.importorskip("pandas")
    assert len(load_results(str(tmp_path))) > 8


# Evaluation and prediction ---------------------------------------------------------------------------------


@line()
def test_evaluate_policy(name):
    """evaluate_policy() takes the model and its policy, with the same result."""
    model = make(name).learn(GENERATION)
    results = []
    for agent in (model, model.policy):
        env = one_env()
        env.seed(5)
        results.append(evaluate_policy(agent, env, n_eval_episodes=4, return_episode_rewards=True))
    assert results[0] == results[1] and len(results[0][0]) == 4


@line()
def test_predict(name):
    """predict() takes one observation or a batch, gives (actions, state), and stays inside the bounds."""
    model = make(name)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(3.0)
    far = np.full(3, 9.0, np.float32)
    one, state = model.predict(far, state=None, episode_start=np.ones(1, bool), deterministic=True)
    many, _ = model.predict(np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32))
    assert one.shape == (2,) and many.shape == (7, 2) and state is None
    assert (many >= toy.TargetEnv.action_space.low).all() and (many <= toy.TargetEnv.action_space.high).all()


@line()
def test_predict_discrete(name):
    """predict() gives whole numbers for Discrete actions."""
    model = make(name, "CartPole-v1")
    one, _ = model.predict(np.zeros(4, np.float32))
    assert np.issubdtype(one.dtype, np.integer) and int(one) in (0, 1)


@line(not_ars="it has no policy for a Dict")
def test_predict_dict(name):
    """A Dict of observations is trained on and predicted from, one or a batch; images channels last or first."""
    algorithm, policy, small = ALGORITHMS[name]
    policy = {"MlpPolicy": "MultiInputPolicy"}.get(policy, policy)
    model = algorithm(policy, make_vec_env(toy.make_goal, 2, seed=0), seed=0, **small).learn(GENERATION)
    obs, _ = toy.make_goal().reset(seed=3)
    one, _ = model.predict(obs)
    many, _ = model.predict({key: np.stack([part] * 7) for key, part in obs.items()})
    first, _ = model.predict({**obs, "seen": obs["seen"].transpose(2, 0, 1)})
    assert one.shape == (2,) and many.shape == (7, 2) and np.any(one) and np.array_equal(one, first)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)


@line()
def test_predict_images(name):
    """An image is trained on and predicted from with its channels last or first; VecTransposeImage may be there."""
    model = make(name, VecTransposeImage(make_vec_env(toy.make_picture, 2, seed=0))).learn(GENERATION)
    obs, _ = toy.make_picture().reset(seed=3)
    assert model.observation_space.shape == (3, 4, 6)
    assert np.array_equal(model.predict(obs)[0], model.predict(obs.transpose(2, 0, 1))[0])
    assert model.predict(np.stack([obs] * 7))[0].shape == (7, 2)


@line(not_ars="the constructor's with_bias and squash_output are not among what a policy saves")
def test_a_policy_is_saved_by_itself(name, tmp_path):
    """policy.save() and Policy.load() keep everything that the policy was made with."""
    own = {"policy_kwargs": {"with_bias": not name.endswith("MlpPolicy")}}
    model = make(name, **own).learn(GENERATION)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(model.predict(obs)[0], loaded.predict(obs)[0])


@line()
def test_parameters_as_a_vector(name):
    """policy.load_from_vector(policy.parameters_to_vector()) changes nothing."""
    model = make(name).learn(GENERATION)
    vector = model.policy.parameters_to_vector()
    model.policy.load_from_vector(vector)
    assert np.array_equal(model.policy.parameters_to_vector(), vector) and np.any(vector)


# VecEnv wrappers -------------------------------------------------------------------------------------------


@line()
def test_vec_env_wrappers(name):
    """VecFrameStack and VecMonitor work as with other algorithms."""
    env = VecFrameStack(VecMonitor(DummyVecEnv([toy.make_target] * 2)), 3)
    model = make(name, env).learn(GENERATION)
    assert model.observation_space.shape == (9,) and len(model.ep_info_buffer) > 0
    assert evaluate_policy(model, env, n_eval_episodes=2, warn=False)


@line()
def test_get_env(name):
    """get_env() is a VecEnv of the given envs, and get_vec_normalize_env() is None without VecNormalize."""
    model = make(name)
    assert model.get_env().num_envs == 1 and model.get_vec_normalize_env() is None
