"""Says which source a result is from."""

import pathlib
import subprocess


def git_commit() -> str:
  """Returns the commit of the package's own checkout, "+" if it has changes.

  "unknown" for an installed package, whatever repository it lies in.
  """
  here = pathlib.Path(__file__).parent

  def git(*args: str) -> str:
    return subprocess.run(
      ["git", "-C", str(here), *args],
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    root = pathlib.Path(git("rev-parse", "--show-toplevel"))
    if root != here.parents[1] or not git("ls-files", str(here)):
      return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return "unknown"
