"""Put the same faults to other libraries and to ours, and write down what happens.

    python tests/reliability/peers.py docs/reliability-peers.md [--only eggroll] [--probe kill]

Every probe runs in a process of its own (probes.py) with a time limit, in a folder of its own. Every word in the
table's cells follows from what was observed: exit status, exception, hashes, files, processes left.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.errors import EggrollError
from eggroll_rl.machine import machine, versions

HERE = Path(__file__).parent
SYSTEMS = {
    "ppo": "Stable-Baselines3: PPO, SubprocVecEnv",
    "ars": "sb3-contrib: ARS, AsyncEval",
    "async": "Gymnasium: AsyncVectorEnv",
    "eggroll": "eggroll-rl: EGGROLL",
}
LEARNERS = ("ppo", "ars", "eggroll")
LIMIT = 90.0  # seconds for a whole probe: interpreters that import torch take several to start
HANG_LIMIT = 20.0  # seconds after the fault
GRACE = 5.0  # seconds in which processes may leave after the end


@dataclass
class Run:
    """What one process did.

    :param status: exit status, negative for a signal; None if it was still running at the limit
    :param seconds: from the fault or the signal to the end, if there was one
    :param text: what was printed
    :param seen: what the process noted itself
    :param left: processes of its session, :data:`GRACE` seconds after its end
    :param files: what was in its folder then, relative paths
    """

    status: int | None
    seconds: float
    text: str
    seen: dict[str, Any]
    left: int
    files: dict[str, bytes]


def run(argv: list[str], folder: Path, limit: float, sent: signal.Signals | None = None) -> Run:
    """Run ``argv`` in a session of its own; ``limit`` counts from FOLDER/fault on, where the fault makes it.

    :param sent: a signal, one second after FOLDER/fault is there
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    environment.pop("PYTEST_CURRENT_TEST", None)
    # Files, not pipes: what outlives the process would hold a pipe open.
    output = folder / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            env=environment,
        )  # fmt: skip
    try:
        started = time.monotonic()
        reached = None
        while process.poll() is None:
            now = time.monotonic()
            if reached is None and (folder / "fault").exists():
                reached = now
            if sent is not None and reached is not None and now - reached > 1:
                process.send_signal(sent)
                reached, sent = now, None
            if now - started > LIMIT or (reached is not None and sent is None and now - reached > limit):
                break
            time.sleep(0.02)
        status = process.poll()
        seconds = time.monotonic() - (reached or started)
        until = time.monotonic() + (GRACE if status is not None else 0)
        while (left := of_session(process.pid)) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        for other in of_session(process.pid):
            other.kill()
        process.wait()
    observed = folder / "observed.json"
    seen = json.loads(observed.read_text()) if observed.exists() else {}
    files = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p not in (output,)
    }
    text = output.read_text(errors="replace").replace(str(folder), "FOLDER")
    return Run(status, seconds, text, seen, len(left), files)


def of_session(sid: int) -> list[psutil.Process]:
    """Return the living processes of a session."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == sid and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


# Words for what was observed ------------------------------------------------------------------------------------------


def yes(value: bool) -> str:
    return "yes" if value else "no"


def short(text: str, most: int = 150) -> str:
    """Return the first line of an error, as code that a table can hold."""
    line = next((line for line in text.strip().splitlines() if line.strip()), "").strip()
    line = re.sub(r"(/[\w.@+-]+){2,}/", "…/", line)
    line = line if len(line) <= most else line[: most - 1] + "…"
    return "`" + line.replace("|", "\\|").replace("`", "'") + "`"


def caught(run: Run) -> str:
    """Return what reached the caller, as "Type: text"."""
    error = run.seen.get("error")
    return "" if error is None else f"{error['type']}: {error['text']}"


def ending(run: Run) -> str:
    if run.status is None:
        return f"still running after {run.seconds:.0f} s"
    if run.status == 0:
        return "runs to its end"
    if run.status < 0:
        return f"ends by {signal.Signals(-run.status).name}"
    return f"{short(caught(run) or last_line(run))}, exit status {run.status}"


def last_line(run: Run) -> str:
    return next((line for line in reversed(run.text.splitlines()) if line.strip()), "")


def left(run: Run) -> str:
    return f"{run.left or 'no'} process{'es' if run.left != 1 else ''} left"


def of_kill(run: Run, undisturbed: Run | None) -> list[str]:
    words = [ending(run)]
    if run.status == 0 and undisturbed is not None and "digest" in run.seen:
        same = run.seen["digest"] == undisturbed.seen["digest"]
        words.append(f"parameters of the undisturbed run: {yes(same)}")
    return [*words, left(run)]


def of_raise(run: Run, _: Run | None) -> list[str]:
    error = caught(run)
    if run.status == 0:
        return [ending(run), *of_parameters(run)]
    head = error.partition("\n")[0]
    return [
        ending(run),
        f"the error names the env's exception: {yes('ZeroDivisionError' in error)}, "
        f"which env or member: {yes(bool(re.search(r'(member|worker|env)[ -]?[0-9]', head, re.I)))}, "
        f"the step: {yes(bool(re.search('step [0-9]', head)))}",
        *([] if "ZeroDivisionError" in error else [f"printed by the worker: {yes('ZeroDivisionError' in run.text)}"]),
    ]


def of_parameters(run: Run) -> list[str]:
    if "digest" not in run.seen:
        return [] if "finite" not in run.seen else [f"what it returned was finite: {yes(run.seen['finite'])}"]
    return [f"parameters finite: {yes(run.seen['finite'])}"]


def said(run: Run, pattern: str) -> list[str]:
    """Quote the first printed line that has ``pattern``, or say that there is none; errors have been quoted."""
    if run.status != 0:
        return []
    lines = [line for line in run.text.splitlines() if re.search(pattern, line, re.I)]
    return [f"prints {short(lines[0])}" if lines else "prints nothing of it"]


def of_nan(run: Run, _: Run | None) -> list[str]:
    return [ending(run), *of_parameters(run), *said(run, r"\bnan\b|finite")]


def of_divergence(run: Run, _: Run | None) -> list[str]:
    log = any(name.endswith("MUJOCO_LOG.TXT") for name in run.files)
    words = [ending(run), *of_parameters(run), *said(run, "diverge|unstable|QVEL|QACC")]
    return [*words, *(["MUJOCO_LOG.TXT in the working directory"] if log else [])]


def of_ending(run: Run, _: Run | None) -> list[str]:
    return [ending(run), left(run)]


def of_hang(run: Run, _: Run | None) -> list[str]:
    if run.status is None:
        return [ending(run)]
    return [f"{ending(run)}, {run.seconds:.0f} s after the fault", *of_parameters(run), left(run)]


def of_term(run: Run, _: Run | None) -> list[str]:
    models = [name for name in run.files if name.endswith((".zip", ".safetensors"))]
    ended = ending(run) if run.status is None or run.status <= 0 else f"exit status {run.status}"
    return [ended, f"model saved: {', '.join(f'`{Path(m).name}`' for m in models) or 'no'}", *of_run(run), left(run)]


def of_run(run: Run) -> list[str]:
    """Say which generation a run folder's checkpoint holds."""
    generation = checkpoint_generation(run)
    if generation is None:
        return []
    last = progress_generation(run)
    return [f"checkpoint of generation {generation}, where the curve ends: {yes(generation == last)}"]


def checkpoint_generation(run: Run) -> int | None:
    """Return the generation of FOLDER/run's checkpoint, or None if there is no readable one."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoints"
        place.mkdir()
        for name, content in run.files.items():
            if name.startswith("run/checkpoints/"):
                (place / Path(name).name).write_bytes(content)
        try:
            return newest_checkpoint(Path(folder))[2]["generation"]
        except EggrollError:
            return None


def progress_generation(run: Run) -> int:
    rows = run.files["run/progress.csv"].decode().splitlines()
    return int(rows[-1].split(",")[rows[0].split(",").index("generation")])


def of_disk(run: Run, _: Run | None) -> list[str]:
    if run.status != 0:
        return [ending(run)]

    def words(seen: dict[str, Any]) -> str:
        loads = "loads" if seen["load_error"] is None else f"does not load: {short(seen['load_error'], 80)}"
        return f"{short(seen['save_error'] or 'no error')}; the file before it intact: {yes(seen['intact'])}, {loads}"

    if "run" in run.seen:
        return [f"run folder: {words(run.seen['run'])}", f"`save`: {words(run.seen)}"]
    return [f"`save`: {words(run.seen)}"]


def of_payload(run: Run, _: Run | None) -> list[str]:
    if run.status != 0:
        return [ending(run)]
    words = f"the payload in a zip for `load` runs: {yes(run.seen['ran'])}"
    if "run" not in run.seen:
        return [words]
    errors = list(run.seen["run"]["errors"].values())
    n_refused = sum(error is not None for error in errors)
    return [
        f"{len(errors)} payloads in a run folder: {n_refused} refused, any ran: {yes(run.seen['run']['ran'])}",
        words,
    ]


def of_workers(run: Run, _: Run | None) -> list[str]:
    if run.status != 0:
        return [ending(run)]
    digests = run.seen["digests"]
    return [
        f"0 and 2 worker processes the same to the bit: {yes(digests['0'] == digests['2'])}",
        f"1 and 2: {yes(digests['1'] == digests['2'])}",
        f"2, twice: {yes(digests['2'] == run.seen['again'])}",
    ]


def of_resume(run: Run, _: Run | None) -> list[str]:
    if run.status != 0:
        return [ending(run)]
    words = [f"two uninterrupted runs the same: {yes(run.seen['repeats'])}"]
    words.append(f"saved, loaded and continued the same: {yes(run.seen['same'])}")
    return words + ([f"run folder resumed the same: {yes(run.seen['run_same'])}"] if "run_same" in run.seen else [])


def of_moments(run: Run, _: Run | None) -> list[str]:
    if run.status != 0:
        return [ending(run)]
    return [
        f"offset {offset}: deviation {found['std']:.6g}, mean off by {abs(found['mean_error']):.2g}"
        for offset, found in run.seen["found"].items()
    ]


# The probes -----------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """One row of the table.

    :param what: the fault, for the reader
    :param kind: function of probes.py, or "cli" for a command line
    :param words: from a run, and from the same without fault if there is one, to the cell's sentences
    :param options: for the function; those of a system alone under its name
    :param sent: signal to the process
    :param limit: seconds from the fault to the verdict that it hangs
    """

    what: str
    kind: str
    words: Callable[[Run, Run | None], list[str]]
    systems: tuple[str, ...] = tuple(SYSTEMS)
    options: dict[str, Any] = field(default_factory=dict)
    only: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: signal.Signals | None = None
    limit: float = LIMIT


_WORST = {"eggroll": {"on_bad_member": "worst"}}
PROBES = {
    "kill": Probe("A worker is killed (SIGKILL) in the middle of a step", "fault", of_kill, options={"fault": "kill"}),
    "raise": Probe("An env raises ZeroDivisionError in `step`", "fault", of_raise, options={"fault": "raise"}),
    "raise_on": Probe(
        'The same, told to go on (`on_bad_member="worst"`)', "fault", of_raise, ("eggroll",), {"fault": "raise"}, _WORST
    ),
    "nan_reward": Probe("One reward is NaN", "fault", of_nan, options={"fault": "nan_reward"}),
    "nan_reward_on": Probe(
        'The same with the library\'s own guard (`VecCheckNan(raise_exception=True)`; `on_bad_member="worst"`)',
        "fault", of_nan, ("ppo", "eggroll"), {"fault": "nan_reward"}, {"ppo": {"check_nan": True}, **_WORST},
    ),
    "nan_obs": Probe("One observation is NaN", "fault", of_nan, options={"fault": "nan_obs"}),
    "hang": Probe("An env hangs in `step`", "fault", of_hang, options={"fault": "hang"}, limit=HANG_LIMIT),
    "hang_limit": Probe(
        "The same with the library's own limit, 5 s (`step_wait(timeout=5)`; `step_timeout=5`)",
        "fault", of_hang, ("async", "eggroll"), {"fault": "hang", "limit": 5}, limit=HANG_LIMIT,
    ),
    "hang_on": Probe(
        'The same, told to go on (`step_timeout=5`, `on_bad_member="worst"`)',
        "fault", of_hang, ("eggroll",), {"fault": "hang", "limit": 5}, _WORST, limit=HANG_LIMIT,
    ),
    "diverge": Probe("MuJoCo diverges: HalfCheetah-v5, velocities of 1e12", "fault", of_divergence,
                     options={"fault": "diverge"}),
    "full_disk": Probe("The disk is full while a model is saved over an older one", "full_disk", of_disk, LEARNERS),
    "parent_killed": Probe("The training process is killed (SIGKILL)", "script", of_ending, LEARNERS,
                           sent=signal.SIGKILL),
    "term_script": Probe("SIGTERM to a script: `learn()`, then `save()`", "script", of_term, LEARNERS,
                         sent=signal.SIGTERM, limit=HANG_LIMIT),
    "term_cli": Probe("SIGTERM to a command line (`rl_zoo3.train`; `eggroll-rl train`)", "cli", of_term,
                      ("ppo", "eggroll"), sent=signal.SIGTERM, limit=HANG_LIMIT),
    "payload": Probe("A model file holds a pickle that runs code", "payload", of_payload, LEARNERS),
    "workers": Probe("One seed, other numbers of worker processes", "workers", of_workers, LEARNERS),
    "resume": Probe("Save, load, continue: the uninterrupted run?", "resume", of_resume, LEARNERS),
    "moments": Probe("Observations are an offset ± 1: what the normalizer finds (deviation 1)", "moments", of_moments,
                     LEARNERS),
}  # fmt: skip


def observe(name: str, system: str) -> Run:
    """Put a probe to a system."""
    probe = PROBES[name]
    with tempfile.TemporaryDirectory() as folder:
        return run(command(probe, system, Path(folder)), Path(folder), probe.limit, probe.sent)


def command(probe: Probe, system: str, folder: Path, **changed: Any) -> list[str]:
    """Return the command of one probe, having written the files that it needs."""
    if probe.kind == "cli":
        return command_line(system, folder)
    options = {**probe.options, **probe.only.get(system, {}), **changed}
    given = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    return [sys.executable, str(HERE / "probes.py"), system, probe.kind, str(folder), *given]


def command_line(system: str, folder: Path) -> list[str]:
    """Return the command that trains on Probe-v0 for ever."""
    kwargs = {"fault": "none", "folder": str(folder)}
    if system == "ppo":
        settings = {"Probe-v0": {"n_envs": 2, "n_timesteps": 10**9, "policy": "MlpPolicy", "n_steps": 32}}
        (folder / "settings.yml").write_text(json.dumps(settings))
        given = [f"{name}:{value!r}" for name, value in kwargs.items()]
        arguments = "-m rl_zoo3.train --algo ppo --env Probe-v0 --gym-packages probe_envs --vec-env subproc --seed 0"
        return [
            sys.executable, *arguments.split(), "--eval-freq", "-1", "--device", "cpu",
            "--conf-file", str(folder / "settings.yml"), "--log-folder", str(folder / "logs"), "--env-kwargs", *given,
        ]  # fmt: skip
    table = "\n".join(f"{name} = {json.dumps(value)}" for name, value in kwargs.items())
    preset = folder / "probe.toml"
    preset.write_text(
        f'env_id = "Probe-v0"\ntotal_timesteps = {10**9}\neval_freq = 0\n[env_kwargs]\n{table}\n'
        "[eggroll]\npopulation_size = 8\nslice_size = 4\n"
    )
    arguments = "-m eggroll_rl train --gym-packages probe_envs --n-workers 2"
    return [sys.executable, *arguments.split(), str(preset), "--output", str(folder / "run")]


def undisturbed(name: str, system: str) -> Run:
    """Run a probe without its fault."""
    probe = PROBES[name]
    with tempfile.TemporaryDirectory() as folder:
        return run(command(probe, system, Path(folder), fault="none"), Path(folder), probe.limit)


def cell(name: str, system: str) -> str:
    """Return what one cell of the table says."""
    probe = PROBES[name]
    if system not in probe.systems:
        return "-"
    result = observe(name, system)
    reference = undisturbed(name, system) if probe.words is of_kill and result.status == 0 else None
    return "<br>".join(probe.words(result, reference))


def table(systems: list[str], names: list[str]) -> str:
    """Run the probes and return the page."""
    rows = [["What is done", *(SYSTEMS[system] for system in systems)], ["---"] * (len(systems) + 1)]
    for name in names:
        rows.append([PROBES[name].what])
        for system in systems:
            rows[-1].append(cell(name, system))
            print(f"{name}, {system}: {rows[-1][-1]}", file=sys.stderr, flush=True)
    on = machine()
    used = ", ".join(f"{package} {version}" for package, version in versions().items())
    return _PAGE.format(
        table="\n".join(f"| {' | '.join(row)} |" for row in rows), versions=used, cores=on["cores"],
        processor=on["processor"], date=time.strftime("%Y-%m-%d"), hang=HANG_LIMIT, grace=GRACE,
    )  # fmt: skip


_PAGE = """# The same faults elsewhere and here

Written by `python tests/reliability/peers.py docs/reliability-peers.md`, which puts each fault to each library in a
process of its own. The cells are made from what was observed and from nothing else: exit status, exception, printed
lines, hashes of parameters and files, processes left in the session {grace:.0f} seconds after the end. "Still running"
is counted from the fault; {hang:.0f} seconds are the limit for a hang. "-": not tried, for want of a counterpart.

{date}, {processor}, {cores} cores; {versions}.

{table}

What is compared: PPO with two envs in SubprocVecEnv, ARS with two AsyncEval workers (seeded by `AsyncEval.seed`),
AsyncVectorEnv with two envs and random actions, EGGROLL with two workers. With 0 workers PPO has its two envs in a
DummyVecEnv; with 1 it has one env and as many samples per update, for there an env is a process. Resuming is tried
without worker processes, and with constant schedules. The faults are in `tests/reliability/probe_envs.py`, what is done
in `probes.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--only", choices=SYSTEMS, action="append", help="a system; may be given again")
    parser.add_argument("--probe", choices=PROBES, action="append", help="a probe; may be given again")
    given = parser.parse_args()
    given.page.write_text(table(given.only or list(SYSTEMS), given.probe or list(PROBES)))


if __name__ == "__main__":
    main()
