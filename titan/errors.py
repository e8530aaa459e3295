"""One tree of errors. Each carries one message, so that it pickles between processes unchanged."""


class TitanError(Exception):
    """Something a user can act on: the message names the setting or file, its value and a remedy.

    `exit_code` is what the command line returns for it.
    """

    exit_code = 1


class ConfigError(TitanError):
    """One or several settings are wrong; the message has one line a mistake."""

    exit_code = 2


class DataError(TitanError):
    """The corpus, the tokenizer or a token shard cannot be used."""


class CheckpointError(TitanError):
    """A checkpoint is missing, damaged, or of another model."""


class LabelError(TitanError):
    """The label log is damaged, or a label did not arrive in time."""


class PlatformError(TitanError):
    """A device, library or host cannot do what the run asks for."""


class RunError(TitanError):
    """The run folder cannot be used, or a running role failed."""


class WorkerError(RunError):
    """A rank of a role failed; the message has role, rank, step, host and the cause."""


class PeerLostError(WorkerError):
    """A rank noticed that another is gone: what happened there is the cause."""


class OvertakenError(RunError):
    """A rank that was given up has come back, and another writes for its role now."""


class StoppedError(TitanError):
    """The run was asked to stop and did; it can be resumed."""

    exit_code = 130


class OutOfTimeError(StoppedError):
    """The grace after SIGTERM was over before every role had saved; steps since the last checkpoints are lost."""

    exit_code = 143
