"""The base of all errors that a user can cause and mend."""


class UserError(ValueError):
  """Bad input; the message names the key, layer or path and the remedy."""


class Interrupted(BaseException):
  """SIGTERM came, and the same command goes on from what is saved.

  No Exception, so that none who mends errors takes a signal for one.
  """
