"""Which source a result is from: the package's own checkout, or none."""

import pathlib
import shutil
import subprocess
import sys

import maestro


def run_copy(root):
  """What a copy of the package at root/maestro says of itself."""
  code = "from maestro.runs.provenance import git_commit; print(git_commit())"
  return subprocess.run(
    [sys.executable, "-c", code],
    cwd=root,
    env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin:/usr/local/bin"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()


def test_an_installed_package_does_not_take_the_commit_around_it(tmp_path):
  def git(*args):
    subprocess.run(["git", "-C", str(tmp_path), *args], check=True)

  git("init", "-q")
  (tmp_path / "own.txt").write_text("a project of the user's")
  git("add", "own.txt")
  user = ("-c", "user.name=a", "-c", "user.email=a@b")
  git(*user, "commit", "-q", "-m", "one")
  place = tmp_path / "env" / "lib"
  package = pathlib.Path(maestro.__file__).parent
  for name in ("__init__.py", "errors.py"):
    (place / "maestro").mkdir(parents=True, exist_ok=True)
    (place / "maestro" / name).write_text("")
  (place / "maestro" / "runs").mkdir()
  (place / "maestro" / "runs" / "__init__.py").write_text("")
  shutil.copy(package / "runs" / "provenance.py", place / "maestro" / "runs")
  assert run_copy(place) == "unknown"
  # Beside the user's own files, but not part of the repository.
  shutil.copytree(place / "maestro", tmp_path / "maestro")
  assert run_copy(tmp_path) == "unknown"
  git("add", "maestro")
  git(*user, "commit", "-q", "-m", "two")
  assert len(run_copy(tmp_path)) == 40
