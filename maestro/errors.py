"""The base of all errors that a user can cause and mend."""


class UserError(ValueError):
  """Bad input; the message names the key, layer or path and the remedy."""
