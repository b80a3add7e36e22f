"""The base of all errors that a user can cause and mend; exit codes."""

EXIT_ERROR = 2  # of the user
EXIT_LOST = 69  # EX_UNAVAILABLE: another process of the run has gone
EXIT_TERMINATED = 75  # EX_TEMPFAIL: run the same command again
EXIT_INTERRUPTED = 130  # what shells say of Ctrl-C


class UserError(ValueError):
  """Bad input; the message names the key, layer or path and the remedy."""


class Interrupted(BaseException):
  """SIGTERM came, and the same command goes on from what is saved.

  No Exception, so that none who mends errors takes a signal for one.
  """
