"""The base of all errors that a user can cause and mend."""


class UserError(ValueError):
  """Bad input; the message names the key, layer or path and the remedy."""


class Interrupted(Exception):  # noqa: N818 - it is no error
  """SIGTERM came; the state is saved, and the same command resumes."""
