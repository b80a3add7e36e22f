"""Says which source a result is from."""

import pathlib
import subprocess


def git_commit() -> str:
  """Returns the commit of the source tree, "+" if it has changes."""
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
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return "unknown"
