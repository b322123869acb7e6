"""What peers.py says of us holds; and what it sees in the other libraries shows that its probes see it."""

import functools
import os
import signal
import subprocess
import sys

import peers
import pytest

SLEEPER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
observe = functools.cache(peers.observe)


@pytest.mark.parametrize(
    ("code", "status", "left"),
    [
        ("raise SystemExit(3)", 3, 0),
        (SLEEPER, 0, 1),
        (f"{SLEEPER}; import os; os.kill(os.getpid(), 9)", -9, 1),
        ("open('fault', 'w'); import time; time.sleep(60)", None, 1),
    ],
    ids=["exit", "orphan", "killed", "hangs"],
)
def test_a_run_is_told_apart(code, status, left, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "GRACE", 0.2)
    seen = peers.run([sys.executable, "-c", code], tmp_path, limit=0.2)
    assert (seen.status, seen.left) == (status, left)


def test_a_signal_is_sent_when_the_fault_was_reached(tmp_path):
    code = "import signal, time; signal.signal(15, lambda *_: exit(5)); open('fault', 'w'); time.sleep(60)"
    seen = peers.run([sys.executable, "-c", code], tmp_path, limit=5, sent=signal.SIGTERM)
    assert seen.status == 5
    assert seen.seconds < 5


def test_the_words_follow_from_what_was_observed():
    def words(status, error=None, left=0, text="", **seen):
        if error is not None:
            seen["error"] = {"type": "ValueError", "text": error}
        return peers.Run(status, 1.0, text, seen, left, {})

    assert peers.of_kill(words(1, "a | b", left=1), None) == [
        "`ValueError: a \\| b`, exit status 1", "1 process left",
    ]  # fmt: skip
    same = [peers.of_kill(words(0, digest=d), words(0, digest="x"))[1] for d in "xy"]
    assert same == ["parameters of the undisturbed run: yes", "parameters of the undisturbed run: no"]
    named = "generation 1, member 2, episode 0, step 3: ZeroDivisionError"
    assert "which env or member: yes, the step: yes" in peers.of_raise(words(1, named), None)[1]
    assert "exception: no, which env or member: no, the step: no" in peers.of_raise(words(1, ""), None)[1]
    assert peers.of_nan(words(0, digest="x", finite=False, text="all well"), None)[1:] == [
        "parameters finite: no", "prints nothing of it",
    ]  # fmt: skip
    assert peers.of_nan(words(0, digest="x", finite=True, text="a\nloss nan"), None)[2] == "prints `loss nan`"
    assert peers.of_hang(words(None), None) == ["still running after 1 s"]


def ran_on(run):
    assert run.status == 0, run.text[-2000:]
    assert run.left == 0


def worker_replaced(run):
    ran_on(run)
    assert run.seen["digest"] == undisturbed("kill").seen["digest"]


@functools.cache
def undisturbed(name):
    return peers.undisturbed(name, "eggroll")


def names_member_and_step(run):
    assert run.status == 1
    text = peers.caught(run)
    assert text.startswith("EpisodeError: generation 5, member ")
    assert ", step 4, " in text
    assert "ZeroDivisionError: broken step" in text


def went_on_finite(run):
    ran_on(run)
    assert run.seen["finite"]


def stopped_finite(run):
    assert run.status == 1
    assert run.seen["finite"]
    assert "finite" in peers.caught(run) or "diverged" in peers.caught(run)


def ended_in_time(run):
    assert run.status is not None
    assert run.seconds < peers.HANG_LIMIT
    assert run.left == 0


def file_intact(run):
    seen = run.seen.get("run", run.seen)
    assert seen["save_error"] is not None
    assert seen["intact"]
    assert seen["load_error"] is None


def resumable_on_full_disk(run):
    file_intact(run)
    assert run.seen["run"]["left"] == []
    assert run.seen["run"]["resume_error"] is None
    assert "safetensors: File too large" in run.seen["run"]["save_error"]


def killed_alone(run):
    assert run.status == -signal.SIGKILL
    assert run.left == 0


def terminated(run):
    assert run.status == -signal.SIGTERM
    assert run.left == 0


def saved_on_term(run):
    assert run.status == 128 + signal.SIGTERM
    assert run.left == 0
    assert peers.checkpoint_generation(run) == peers.progress_generation(run) > 0


def nothing_ran(run):
    assert run.status == 0, run.text[-2000:]
    assert not run.seen.get("run", run.seen)["ran"]


def payloads_refused(run):
    nothing_ran(run)
    seen = run.seen["run"]
    assert seen["payload_works"]
    assert seen["control_error"] is None
    assert all((error or "").startswith("RunFolderError") for error in seen["errors"].values()), seen["errors"]


def same_for_any_workers(run):
    ran_on(run)
    assert len({*run.seen["digests"].values(), run.seen["again"]}) == 1


def resumed_the_same(run):
    ran_on(run)
    assert run.seen["repeats"]
    assert run.seen["same"]


def run_resumed_the_same(run):
    resumed_the_same(run)
    assert run.seen["run_same"]


def moments_exact(run):
    ran_on(run)
    for found in run.seen["found"].values():
        assert found["std"] == pytest.approx(1, abs=1e-9)
        assert abs(found["mean_error"]) < 1e-6


CLAIMS = [
    ("R1", "kill", worker_replaced),
    ("R3", "raise", names_member_and_step),
    ("R3", "raise_on", went_on_finite),
    ("R4", "nan_reward", stopped_finite),
    ("R4", "nan_reward_on", went_on_finite),
    ("R4", "nan_obs", stopped_finite),
    ("R20", "hang_limit", ended_in_time),
    ("R20", "hang_on", went_on_finite),
    ("R5", "diverge", stopped_finite),
    ("R9", "full_disk", resumable_on_full_disk),
    ("R7", "parent_killed", killed_alone),
    ("R7", "term_script", terminated),
    ("R6", "term_cli", saved_on_term),
    ("R13", "payload", payloads_refused),
    ("R11", "workers", same_for_any_workers),
    ("R10", "resume", run_resumed_the_same),
    ("R22", "moments", moments_exact),
]
# What another library does, which the same check has to notice.
CONTROLS = [
    ("R4", "nan_reward", "ppo", stopped_finite),
    ("R20", "hang", "async", ended_in_time),
    ("R9", "full_disk", "ppo", file_intact),
    ("R13", "payload", "ppo", nothing_ran),
    ("R10", "resume", "ppo", resumed_the_same),
    ("R22", "moments", "ppo", moments_exact),
]


def marked(promise, *values):
    return pytest.param(*values, marks=pytest.mark.promise(promise), id=f"{promise}-{values[0]}")


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "check"), [marked(*claim) for claim in CLAIMS])
def test_what_is_said_of_us_holds(name, check, cells):
    with cells.cell(peers.PROBES[name].what):
        check(observe(name, "eggroll"))


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "system", "check"), [marked(*control) for control in CONTROLS])
def test_the_probe_sees_the_fault_elsewhere(name, system, check, cells):
    with cells.control(f"{peers.PROBES[name].what}: {peers.SYSTEMS[system]}"):
        check(observe(name, system))


@pytest.mark.reliability
def test_the_script_writes_the_page(tmp_path):
    page = tmp_path / "page.md"
    arguments = ["--only", "async", "--only", "eggroll", "--probe", "payload"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, peers.__file__, page, *arguments], env=environment, check=True, capture_output=True)
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert [row.count(" | ") for row in rows] == [2, 2, 2]
    assert "| - | 7 payloads in a run folder: 7 refused, any ran: no<br>" in rows[2]
    assert "stable-baselines3 2." in page.read_text()
