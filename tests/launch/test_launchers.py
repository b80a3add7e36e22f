"""Tests launch/: what is run, forwarded, retried and left, against stand-ins.

No scheduler and no cloud is needed: gcloud, srun and scontrol are small scripts
that write down how they were called. local.sh runs real processes, of a script
that stands in for Python.

UPDATE_TRANSCRIPTS=1 writes the transcripts of the dry runs anew.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TRANSCRIPTS = pathlib.Path(__file__).with_name("transcripts")
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh")
TRAIN = ("--config=configs/digits_od.py:smoke", "--workdir=/shared/a b")
TPU = ("--name=try", "--zone=z", "--type=v4-32", "--version=base")
AGAIN = (69, 75, 134, 137)


def _bash(path):
  """Whether Bash is there and new enough."""
  if shutil.which("bash", path=path) is None:
    return False
  command = [
    "bash",
    "-c",
    "((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] > 403))",
  ]
  return subprocess.run(command).returncode == 0


pytestmark = pytest.mark.skipif(
  not _bash(os.environ.get("PATH")), reason="needs Bash 4.4"
)


# As from a terminal: nohup, and shells that put tests behind, ignore some.
HEAR = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
  signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Desk:
  """A directory with stand-ins on PATH, and what they wrote down."""

  def __init__(self, path):
    self.path = path
    self.bin = path / "bin"
    self.bin.mkdir()
    (path / "tmp").mkdir()
    # Nothing of the session that runs the tests is to change what scripts do.
    self.env = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "HOME": str(path),
      "TMPDIR": str(path / "tmp"),
      "DESK": str(path),
      "POLL_SECONDS": "0",
    }

  def put(self, name, body):
    """Puts a command on PATH, which writes down its calls."""
    file = self.bin / name
    head = '#!/usr/bin/env bash\nset -u\necho "${0##*/} $*" >>"$DESK/calls"\n'
    file.write_text(head + body, encoding="utf-8")
    file.chmod(0o755)
    return file

  def _command(self, script, args):
    return ["bash", str(ROOT / "launch" / script), *args]

  def run(self, script, *args, **env):
    return subprocess.run(
      self._command(script, args),
      cwd=ROOT,
      env=self.env | env,
      capture_output=True,
      text=True,
      timeout=30,
      stdin=subprocess.DEVNULL,
    )

  @contextlib.contextmanager
  def started(self, script, *args, **env):
    with subprocess.Popen(
      [sys.executable, "-c", HEAR, *self._command(script, args)],
      cwd=ROOT,
      env=self.env | env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    ) as process:
      try:
        yield process
      finally:
        if process.poll() is None:
          process.kill()

  def calls(self, about=""):
    file = self.path / "calls"
    lines = (
      file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    )
    return [line for line in lines if about in line]

  def wait_for(self, *names):
    until = time.monotonic() + 20
    while not all((self.path / name).exists() for name in names):
      assert time.monotonic() < until, f"{names} did not come"
      time.sleep(0.02)


@pytest.fixture
def desk(tmp_path):
  return Desk(tmp_path)


# ---------------------------------------------------------------------------
# All scripts
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_given(desk, script):
  done = desk.run(script, "--help")
  assert done.returncode == 0
  assert f"launch/{script}" in done.stdout
  assert not done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_run_and_says_its_purpose(script):
  file = ROOT / "launch" / script
  lines = file.read_text(encoding="utf-8").splitlines()
  assert lines[0] == "#!/usr/bin/env bash"
  assert re.match("# [A-Z].*[.:]$", lines[1])
  assert max(map(len, lines)) <= 80
  assert os.access(file, os.X_OK) or script.endswith(".sbatch")


@pytest.mark.skipif(
  shutil.which("shellcheck") is None, reason="shellcheck is not on PATH"
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
  subprocess.run(
    ["shellcheck", "--shell=bash", str(ROOT / "launch" / script)], check=True
  )


@pytest.mark.parametrize(
  ("name", "script", "args", "env"),
  [
    ("local_cpus", "local.sh", ("--processes=2", "--", *TRAIN), {}),
    (
      "local_gpus",
      "local.sh",
      ("--gpus", "--log-dir=my logs", "--", *TRAIN),
      {"CUDA_VISIBLE_DEVICES": "4,6", "PYTHON": "python3.12"},
    ),
    ("slurm_gpus", "slurm.sbatch", TRAIN, {}),
    (
      "slurm_nodes",
      "slurm.sbatch",
      TRAIN,
      {"SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "30007"},
    ),
    (
      "tpu_pod",
      "tpu_pod.sh",
      (*TPU, "--spot", "--project=p", "--setup=mount /x", "--", *TRAIN),
      {},
    ),
    (
      "tpu_delete_after",
      "tpu_pod.sh",
      (*TPU, "--delete-after", "--", *TRAIN),
      {},
    ),
    ("tpu_delete", "tpu_pod.sh", ("--name=try", "--zone=z", "--delete"), {}),
  ],
)
def test_a_dry_run_prints_what_would_be_run(desk, name, script, args, env):
  for command in ("gcloud", "srun", "git"):
    desk.put(command, "")
  done = desk.run(script, "--dry-run", *args, **env)
  assert (done.returncode, done.stderr) == (0, "")
  file = TRANSCRIPTS / f"{name}.txt"
  if os.environ.get("UPDATE_TRANSCRIPTS"):
    file.write_text(done.stdout, encoding="utf-8")
  assert done.stdout == file.read_text(encoding="utf-8")
  assert not desk.calls()


@pytest.mark.parametrize(
  ("script", "args", "says"),
  [
    ("local.sh", ("--processes=2",), "nothing to run"),
    ("local.sh", ("--processes=2", "--config=c"), "stand behind --"),
    ("local.sh", ("--", "--config=c"), "--processes="),
    ("local.sh", ("--processes=0", "--", "--config=c"), "--processes='0'"),
    ("local.sh", ("--processes=1+1", "--", "--config=c"), "no number"),
    ("local.sh", ("--processes=2", "--retries=x", "--", "c"), "--retries='x'"),
    ("slurm.sbatch", (), "nothing to run"),
    ("slurm.sbatch", ("--config=c",), "not in a job"),
    ("tpu_pod.sh", ("--zone=z", "--", "--config=c"), "--name and --zone"),
    ("tpu_pod.sh", (*TPU[:2], "--", "--config=c"), "--type and --version"),
    ("tpu_pod.sh", (*TPU, "--config=c"), "stand behind --"),
    ("tpu_worker.sh", ("fly",), "launch/tpu_worker.sh"),
  ],
)
def test_a_mistake_is_named(desk, script, args, says):
  desk.put("gcloud", "")
  done = desk.run(script, *args)
  assert done.returncode == 2
  assert says in done.stderr
  assert not desk.calls()


def test_what_the_readme_says_can_be_run(desk):
  desk.put("nvidia-smi", "for i in {0..7}; do echo GPU $i: H100; done")
  desk.put("sbatch", 'bash "$2" --dry-run "${@:3}"')
  desk.put("kubectl", "cat >/dev/null")
  if shutil.which("envsubst") is None:
    desk.put("envsubst", "cat")
  text = (ROOT / "launch/README.md").read_text(encoding="utf-8")
  blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
  # That one takes as long as JAX takes to start; test_doctor.py tests it.
  blocks = blocks.replace(".venv/bin/python -m launch.doctor", "true")
  blocks = blocks.replace(".venv/bin/python -m maestro.goodput", "printf 60")
  blocks = re.sub(r"(launch/(local|tpu_pod)\.sh)", r"\1 --dry-run", blocks)
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", blocks],
    cwd=ROOT,
    env=desk.env,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.count("CUDA_VISIBLE_DEVICES=") == 8
  assert done.stdout.count("queued-resources create") == 3
  assert len(desk.calls("kubectl")) == 1


# ---------------------------------------------------------------------------
# local.sh, with real processes
# ---------------------------------------------------------------------------

# Writes down its place; then does what $DESK/do_<its index>, if any, says.
PYTHON = """
: "${JAX_PLATFORMS:=}" "${CUDA_VISIBLE_DEVICES:=}"
index=${*: -1}
index=${index#--process_id=}
echo "$JAX_PLATFORMS|$CUDA_VISIBLE_DEVICES|$*" >>"$DESK/process_$index"
stay() { touch "$DESK/ready_$index"; for _ in {1..1500}; do sleep 0.02; done; }
if [[ -e $DESK/do_$index ]]; then . "$DESK/do_$index"; fi
"""


@pytest.fixture
def local(desk):
  desk.env["PYTHON"] = str(desk.put("fakepython", PYTHON))

  def do(**what):
    for name, body in what.items():
      (desk.path / f"do_{name[1:]}").write_text(body, encoding="utf-8")
    return desk

  return do


def _flags(desk, index):
  """What process `index` got, for each attempt."""
  file = desk.path / f"process_{index}"
  return [x.split("|") for x in file.read_text(encoding="utf-8").splitlines()]


def _port(desk, index, attempt=0):
  return int(
    re.search(r"=127\.0\.0\.1:(\d+)", _flags(desk, index)[attempt][2])[1]
  )


def test_every_process_gets_its_place(local):
  desk = local(_0="echo first; echo bad >&2", _1="echo second")
  done = desk.run("local.sh", "--processes=3", "--", *TRAIN)
  assert (done.returncode, done.stdout, done.stderr) == (0, "first\n", "bad\n")
  port = _port(desk, 0)
  assert 1024 < port < 32768
  for i in range(3):
    ((platform, _, args),) = _flags(desk, i)
    assert platform == "cpu"
    assert args == (
      f"-m maestro.main {' '.join(TRAIN)} --coordinator=127.0.0.1:{port}"
      f" --num_processes=3 --process_id={i}"
    )
  assert not list((desk.path / "tmp").iterdir())  # of its own making


def test_every_process_gets_a_gpu(local):
  desk = local()
  desk.put("nvidia-smi", "echo 'GPU 0: H100'; echo 'GPU 1: H100'")
  assert desk.run("local.sh", "--gpus", "--", *TRAIN).returncode == 0
  assert [_flags(desk, i)[0][:2] for i in range(2)] == [["", "0"], ["", "1"]]
  assert (
    desk.run(
      "local.sh", "--gpus", "--", *TRAIN, CUDA_VISIBLE_DEVICES="5"
    ).stderr
    == ""
  )
  assert _flags(desk, 0)[1][1] == "5"


@pytest.mark.parametrize(
  ("first", "others", "code", "says"),
  [
    ("exit 2", "sleep 0.2; exit 2", 2, "process 1 exited with code 2"),
    ("exit 75", "exit 75", 75, "has saved (code 75)"),
    ("exit 3", "sleep 0.3; exit 69", 3, "process 1 exited with code 3"),
    # All are found gone in the same look, or in the order of the harm.
    ("sleep 0.05; kill -KILL $$", "exit 69", 137, "killed by SIGKILL"),
    ("kill -SEGV $$", "kill -ABRT $$", 139, "killed by SIGSEGV"),
    ("exit 0", "exit 130", 130, "stopped by Ctrl-C"),
  ],
)
def test_the_code_is_that_of_the_first_that_failed(
  local, first, others, code, says
):
  desk = local(_0=others, _1=f"ulimit -c 0; {first}", _2=others)
  done = desk.run("local.sh", "--processes=3", "--", *TRAIN)
  assert done.returncode == code
  assert says in done.stderr
  if code == 137:
    assert "process 1 was killed by SIGKILL; the kernel's log" in done.stderr
    assert "local.sh: line" not in done.stderr  # Bash's own report


def test_logs_are_kept_and_named(local):
  desk = local(_0="sleep 0.3; exit 69", _1="echo why; exit 2", _2="echo me too")
  done = desk.run("local.sh", "--processes=3", "--", *TRAIN)
  logs = pathlib.Path(
    re.search("what the other processes said: (.*)", done.stderr)[1]
  )
  assert logs.parent == desk.path / "tmp"
  assert (logs / "process_1.log").read_text(encoding="utf-8") == "why\n"
  assert "process_1.log:\nwhy\n" in done.stderr  # its end is shown
  mine = desk.path / "my logs"
  mine.mkdir()
  (mine / "process_2.log").write_text("old\n", encoding="utf-8")
  desk.run("local.sh", "--processes=3", f"--log-dir={mine}", "--", *TRAIN)
  assert (mine / "process_2.log").read_text(encoding="utf-8") == "old\nme too\n"


@pytest.mark.parametrize("end", ["exit 69", "exit 75", "kill -KILL $$"])
def test_it_runs_again_with_another_port(local, end):
  desk = local(_1=f'(($(wc -l <"$DESK/process_1") > 2)) || {end}')
  done = desk.run("local.sh", "--processes=2", "--retries=5", "--", *TRAIN)
  assert done.returncode == 0
  assert "runs again, 2 of at most 5" in done.stderr
  ports = [_port(desk, 1, attempt) for attempt in range(3)]
  assert ports == [_port(desk, 0, attempt) for attempt in range(3)]
  assert ports[0] != ports[1] != ports[2]


@pytest.mark.parametrize(("code", "runs"), [(75, 2), (2, 1), (130, 1)])
def test_retries_are_bounded_and_not_for_all(local, code, runs):
  desk = local(_1=f"exit {code}")
  done = desk.run("local.sh", "--processes=2", "--retries=1", "--", *TRAIN)
  assert done.returncode == code
  assert len(_flags(desk, 1)) == runs


@pytest.mark.parametrize(
  ("sent", "name", "code"),
  [("TERM", "TERM", 75), ("INT", "INT", 130), ("HUP", "TERM", 75)],
)
def test_a_signal_goes_to_all_and_ends_the_retries(local, sent, name, code):
  body = f"trap 'echo got {name} >>\"$DESK/got\"; exit {code}' {name}; stay"
  desk = local(_0=body, _1=body)
  with desk.started(
    "local.sh", "--processes=2", "--retries=9", "--", *TRAIN
  ) as process:
    desk.wait_for("ready_0", "ready_1")
    process.send_signal(getattr(signal, f"SIG{sent}"))
    out, _ = process.communicate(timeout=20)
  assert process.returncode == code, out
  got = (desk.path / "got").read_text(encoding="utf-8")
  assert got == f"got {name}\n" * 2
  assert len(_flags(desk, 0)) == 1


def test_one_that_hangs_is_killed_in_the_end(local):
  desk = local(_0="exit 69", _1="trap '' TERM; stay")
  done = desk.run("local.sh", "--processes=2", "--grace=0", "--", *TRAIN)
  assert done.returncode == 137  # it was the one that the others lost
  assert "process 1 did not end within 0 s: killed" in done.stderr


# ---------------------------------------------------------------------------
# slurm.sbatch
# ---------------------------------------------------------------------------


def _slurm(desk, code, **env):
  desk.put("srun", f"exit {code}")
  desk.put("scontrol", "echo node-7")
  job = {"SLURM_JOB_ID": "12", "SLURM_NTASKS_PER_NODE": "8"}
  return desk.run("slurm.sbatch", *TRAIN, **(job | env))


@pytest.mark.parametrize("code", [0, 2, 1, 130, *AGAIN])
def test_slurm_requeues_what_can_go_on(desk, code):
  done = _slurm(desk, code)
  assert done.returncode == code
  assert desk.calls("requeue") == ["scontrol requeue 12"] * (code in AGAIN)
  (call,) = desk.calls("srun")
  assert call.endswith(f"python3 -m maestro.main {' '.join(TRAIN)}")


def test_slurm_requeues_only_so_often(desk):
  done = _slurm(desk, 75, SLURM_RESTART_COUNT="3", RESTARTS="3")
  assert done.returncode == 75
  assert "after 3 restarts: no more" in done.stderr
  assert not desk.calls("requeue")


def test_a_task_a_node_is_told_its_place(desk):
  desk.put("fakepython", "")
  desk.put("scontrol", "echo node-7; echo node-8")
  # Runs what stands behind its options, as the second task.
  desk.put(
    "srun",
    "while [[ $1 == --* ]]; do shift; done\n"
    'SLURM_NTASKS=2 SLURM_PROCID=1 exec "$@"',
  )
  done = desk.run(
    "slurm.sbatch",
    *TRAIN,
    PYTHON="fakepython",
    SLURM_JOB_ID="30007",
    SLURM_NTASKS_PER_NODE="1",
  )
  assert done.returncode == 0
  assert desk.calls("fakepython -m")[1:] == [
    f"fakepython -m maestro.main {' '.join(TRAIN)} --coordinator=node-7:26007"
    " --num_processes=2 --process_id=1"
  ]


def test_a_job_that_slurm_ends_is_not_requeued(desk):
  desk.put("srun", 'touch "$DESK/ready"; sleep 0.5; exit 75')
  desk.put("scontrol", "")
  with desk.started(
    "slurm.sbatch",
    *TRAIN,
    SLURM_JOB_ID="12",
    SLURM_NTASKS_PER_NODE="8",
    POLL_SECONDS="0.05",
  ) as process:
    desk.wait_for("ready")
    process.terminate()
    out, _ = process.communicate(timeout=20)
  assert process.returncode == 75
  assert "not requeued" in out
  assert not desk.calls("requeue")


# ---------------------------------------------------------------------------
# tpu_pod.sh and tpu_worker.sh
# ---------------------------------------------------------------------------

# Takes what it says from the lines of $DESK/states and $DESK/codes in turn; the
# last one stays. "gone" is a connection that breaks.
GCLOUD = """
next() {
  local line
  line=$(head -n 1 "$DESK/$1")
  (($(wc -l <"$DESK/$1") == 1)) || sed -i 1d "$DESK/$1"
  echo "$line"
}
case "$*" in
  *queued-resources\\ describe*)
    state=$(next states)
    [[ $state == NONE ]] && echo "ERROR: NOT_FOUND: try" >&2 && exit 1
    [[ $state == UNKNOWN ]] && echo "ERROR: no permission" >&2 && exit 1
    echo "$state"
    ;;
  *queued-resources\\ create*) [[ ! -e $DESK/no_create ]] ;;
  *queued-resources\\ delete*) [[ ! -e $DESK/no_delete ]] ;;
  *tpu_worker.sh\\ install*) [[ ! -e $DESK/no_install ]] ;;
  *tpu_worker.sh\\ start*) cat "$DESK/refusal" 2>/dev/null || true ;;
  *tpu_worker.sh\\ follow*)
    echo "step 1"
    code=$(next codes)
    [[ $code == stay ]] && touch "$DESK/ready" && exec sleep 20
    [[ $code == gone ]] && exit 255
    echo "maestro ended with code $code"
    ;;
esac
"""
DELETE = (
  "gcloud compute tpus queued-resources delete try --zone=z --force --quiet"
)


@pytest.fixture
def cloud(desk):
  desk.put("gcloud", GCLOUD)
  desk.put("git", "")

  def answers(states, codes="0", *, without=()):
    for name, text in (("states", states), ("codes", codes)):
      lines = "\n".join(text.split()) + "\n"
      (desk.path / name).write_text(lines, encoding="utf-8")
    for name in without:
      (desk.path / f"no_{name}").touch()
    return desk

  return answers


def _steps(desk):
  """The calls, in short."""
  found = []
  for call in desk.calls("gcloud"):
    word = re.search(
      r"queued-resources (create|delete)|worker.sh (start|follow|stop)|"
      r"worker.sh (install);|(scp)",
      call,
    )
    if word:
      found += filter(None, word.groups())
  return found


def _stays(done):
  """Whether it says that the TPU is still there, and how to delete it."""
  return "STILL THERE" in done.stderr and done.stderr.endswith(f"  {DELETE}\n")


def test_a_tpu_is_created_and_stays(cloud):
  desk = cloud("NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
  done = desk.run("tpu_pod.sh", *TPU, "--spot", "--", *TRAIN)
  assert done.returncode == 0, done.stderr
  assert _steps(desk) == ["create", "scp", "install", "start", "follow"]
  (create,) = desk.calls("resources create")
  assert "--accelerator-type=v4-32 --runtime-version=base --spot" in create
  assert (
    r"start --config=configs/digits_od.py:smoke --workdir=/shared/a\ b"
    in (desk.calls("worker.sh start")[0])
  )
  assert "step 1" in done.stdout
  assert _stays(done)
  assert not list((desk.path / "tmp").iterdir())


def test_a_tpu_that_is_there_is_taken(cloud):
  desk = cloud("ACTIVE")
  done = desk.run("tpu_pod.sh", *TPU, "--setup=mount /x", "--", *TRAIN)
  assert done.returncode == 0, done.stderr
  assert _steps(desk) == ["scp", "install", "start", "follow"]
  assert len(desk.calls("--worker=all --command=mount /x")) == 1
  assert _stays(done)


def test_a_preempted_tpu_is_created_again(cloud):
  desk = cloud("ACTIVE SUSPENDING SUSPENDED NONE ACTIVE", "gone 0")
  done = desk.run("tpu_pod.sh", *TPU, "--delete-after", "--", *TRAIN)
  assert done.returncode == 0, done.stderr
  first = ["scp", "install", "start", "follow"]
  assert _steps(desk) == [*first, "delete", "create", *first, "delete"]
  assert "try was preempted (SUSPENDING)" in done.stderr
  assert "try is deleted" in done.stderr
  assert "STILL THERE" not in done.stderr


def test_a_run_that_stopped_goes_on(cloud):
  desk = cloud("ACTIVE", "75 69 0")
  done = desk.run("tpu_pod.sh", *TPU, "--", *TRAIN)
  assert done.returncode == 0, done.stderr
  again = ["stop", "start", "follow"]
  assert _steps(desk) == ["scp", "install", "start", "follow", *again, *again]


def test_a_broken_connection_does_not_stop_the_run(cloud):
  desk = cloud("ACTIVE", "gone 0")
  done = desk.run("tpu_pod.sh", *TPU, "--", *TRAIN)
  assert done.returncode == 0, done.stderr
  assert "the connection broke" in done.stderr
  assert "stop" not in _steps(desk)


@pytest.mark.parametrize(
  ("codes", "code", "follows"), [("75", 75, 3), ("gone", 1, 3), ("2", 2, 1)]
)
def test_it_ends_with_the_code_after_so_many_retries(
  cloud, codes, code, follows
):
  desk = cloud("ACTIVE", codes)
  done = desk.run("tpu_pod.sh", *TPU, "--retries=2", "--", *TRAIN)
  assert done.returncode == code
  assert _steps(desk).count("follow") == follows
  assert _stays(done)


@pytest.mark.parametrize("delete_after", [False, True])
def test_a_failed_installation_ends_it(cloud, delete_after):
  desk = cloud("ACTIVE", without=["install"])
  options = ["--delete-after"] * delete_after
  done = desk.run("tpu_pod.sh", *TPU, *options, "--", *TRAIN)
  assert done.returncode == 1
  assert "the installation failed" in done.stderr
  assert _steps(desk) == ["scp", "install"] + ["delete"] * delete_after
  assert _stays(done) != delete_after


def test_another_run_is_left_alone(cloud):
  desk = cloud("ACTIVE")
  refusal = "maestro ended with code 2\n"
  (desk.path / "refusal").write_text(refusal, encoding="utf-8")
  done = desk.run("tpu_pod.sh", *TPU, "--", *TRAIN)
  assert done.returncode == 2
  assert _steps(desk) == ["scp", "install", "start"]


@pytest.mark.parametrize(
  ("states", "without", "says", "steps"),
  [
    ("NONE", ["create"], "could not be created", ["create"]),
    ("NONE WAITING FAILED", [], "was not granted", ["create"]),
    ("UNKNOWN", [], "no answer", []),
  ],
)
def test_a_tpu_that_does_not_come_ends_it(cloud, states, without, says, steps):
  desk = cloud(states, without=without)
  done = desk.run("tpu_pod.sh", *TPU, "--", *TRAIN)
  assert done.returncode == 1
  assert says in done.stderr
  assert _steps(desk) == steps
  # What is known to be there, or is not known, is named.
  assert _stays(done) == (states != "NONE")


def test_a_failed_deletion_is_said_aloud(cloud):
  desk = cloud("ACTIVE", without=["delete"])
  done = desk.run("tpu_pod.sh", *TPU, "--delete-after", "--", *TRAIN)
  assert "THE DELETION FAILED" in done.stderr
  assert _stays(done)


def test_only_deletes(cloud):
  desk = cloud("ACTIVE")
  done = desk.run("tpu_pod.sh", "--name=try", "--zone=z", "--delete")
  assert done.returncode == 0
  assert desk.calls() == [DELETE]


@pytest.mark.parametrize("delete_after", [False, True])
def test_a_stopped_launcher_says_what_is_left(cloud, delete_after):
  desk = cloud("ACTIVE", "stay")
  options = ["--delete-after"] * delete_after
  with desk.started("tpu_pod.sh", *TPU, *options, "--", *TRAIN) as process:
    desk.wait_for("ready")
    process.terminate()
    out, _ = process.communicate(timeout=10)  # not the 20 s of the follower
  assert process.returncode == 143
  assert "a run that was started goes on" in out
  assert (DELETE in desk.calls()) == delete_after
  assert ("STILL THERE" in out) != delete_after


@pytest.fixture
def worker(desk):
  """A host of a TPU: a home with a copy of the repository."""
  launch = desk.path / "maestro" / "launch"
  launch.mkdir(parents=True)
  shutil.copy(ROOT / "launch/tpu_worker.sh", launch)
  python = desk.path / "maestro/.venv/bin/python"
  python.parent.mkdir(parents=True)

  def run(verb, *args):
    return subprocess.run(
      ["bash", "maestro/launch/tpu_worker.sh", verb, *args],
      cwd=desk.path,
      env=desk.env,
      capture_output=True,
      text=True,
      timeout=30,
    )

  def does(body):
    python.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    python.chmod(0o755)
    return run

  yield does
  run("stop")


def test_a_worker_runs_detached_and_tells_the_code(worker):
  run = worker('echo "got $*"; exit 3')
  assert run("start", *TRAIN).returncode == 0
  done = run("follow")
  assert done.stdout == (
    f"got -m maestro.main {' '.join(TRAIN)} --distributed\n"
    "maestro ended with code 3\n"
  )
  assert run("running").returncode != 0


def test_a_worker_keeps_the_run_it_has(worker, desk):
  run = worker(
    'echo x >>"$HOME/starts"; trap "echo saved; exit 75" TERM\n'
    "while true; do sleep 0.02; done"
  )
  assert run("start", *TRAIN).returncode == 0
  desk.wait_for("starts")
  assert run("running").returncode == 0
  assert run("start", *TRAIN).returncode == 0  # the same: it is found there
  other = run("start", "--config=other")
  assert other.returncode == 2
  assert other.stdout == "maestro ended with code 2\n"
  assert "another run is there" in other.stderr
  assert run("stop").returncode == 0
  assert run("follow").stdout == "saved\nmaestro ended with code 75\n"
  assert (desk.path / "starts").read_text(encoding="utf-8") == "x\n"


# ---------------------------------------------------------------------------
# gke_jobset.yaml
# ---------------------------------------------------------------------------

JOBSET = {
  "NAME": "try",
  "IMAGE": "registry/maestro:1",
  "HOSTS": "4",
  "CHIPS": "4",
  "ACCELERATOR": "tpu-v6e-slice",
  "TOPOLOGY": "4x4",
  "CLAIM": "runs",
  "GRACE": "90",
  "ARGUMENTS": '"--config=configs/digits_od.py", "--workdir=/runs/a b"',
}


def test_the_jobset_renders_and_starts_every_process(desk):
  yaml = pytest.importorskip("yaml")
  text = (ROOT / "launch/gke_jobset.yaml").read_text(encoding="utf-8")
  used = set(re.findall(r"\$\{(\w+)\}", text))
  assert used == set(JOBSET)
  named = re.search("envsubst '(.*?)'", text, re.DOTALL)[1]
  assert set(re.findall(r"\$(\w+)", named)) == used
  # As envsubst does, which leaves other variables alone.
  jobset = yaml.safe_load(string.Template(text).safe_substitute(JOBSET))
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["completions"] == job["parallelism"] == 4
  assert job["completionMode"] == "Indexed"
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  command = [*container["command"], *container["args"]]
  desk.put("python", 'printf "%s\\n" "$@"')
  done = subprocess.run(
    command,
    env=desk.env | {"JOB_COMPLETION_INDEX": "3"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines() == [
    *("-m", "maestro.main", "--config=configs/digits_od.py"),
    *("--workdir=/runs/a b", "--coordinator=try-workers-0-0.try:7650"),
    *("--num_processes=4", "--process_id=3"),
  ]


def test_the_jobset_goes_on_after_what_can_go_on():
  yaml = pytest.importorskip("yaml")
  text = (ROOT / "launch/gke_jobset.yaml").read_text(encoding="utf-8")
  jobset = yaml.safe_load(string.Template(text).safe_substitute(JOBSET))
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  actions = {
    code: rule["action"]
    for rule in job["podFailurePolicy"]["rules"]
    for code in rule.get("onExitCodes", {}).get("values", [])
  }
  assert actions == {2: "FailJob", 75: "Count", 69: "Count", 134: "Count"}
  assert job["backoffLimit"] == 0
  rules = jobset["spec"]["failurePolicy"]["rules"]
  assert {
    reason: rule["action"]
    for rule in rules
    for reason in rule["onJobFailureReasons"]
  } == {
    "PodFailurePolicy": "FailJobSet",
    "BackoffLimitExceeded": "RestartJobSet",
  }
  pod = job["template"]["spec"]
  assert pod["terminationGracePeriodSeconds"] == 90
  assert pod["restartPolicy"] == "Never"
  assert pod["terminationGracePeriodSeconds"] >= 60
