"""The base of all errors that a user can cause and mend; exit codes."""

EXIT_ERROR = 2  # of the user
EXIT_LOST = 69  # EX_UNAVAILABLE: another process of the run is not there
EXIT_TERMINATED = 75  # EX_TEMPFAIL: run the same command again
EXIT_INTERRUPTED = 130  # what shells say of Ctrl-C


class UserError(ValueError):
  """Bad input; the message names the key, layer or path and the remedy."""

  exit_code = EXIT_ERROR


class LostError(UserError):
  """Another process of the run has gone, or never came; run all again."""

  exit_code = EXIT_LOST


class Interrupted(BaseException):
  """SIGTERM came, and the same command goes on from what is saved.

  No Exception, so that none who mends errors takes a signal for one.
  """
