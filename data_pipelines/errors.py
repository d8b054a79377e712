"""The errors that a user can mend. Every command prints them without a traceback and exits with their code."""


class UserError(ValueError):
    """A mistake in a config, a path or an input. Says what was got, what was expected and which key or file to change."""

    exit_code = 2


class DataBudgetExceeded(UserError):
    """More samples were unusable than `data.max_bad_fraction` allows."""

    exit_code = 3


class NoValidCheckpoint(UserError):
    """Checkpoints exist, none of them passes verification. Never answered by training from scratch."""

    exit_code = 4


class AccessDenied(UserError):
    """A store refuses the credentials, or there are none. Names the bucket and the profile, never the secret."""

    exit_code = 5


class StorageUnavailable(UserError):
    """A store does not answer, for longer than is waited. The samples are good: no reason to skip them, one to start again later."""

    exit_code = 75
