"""The errors of the product, and the exit codes that its commands end with.

EdgeError                      every error a user can meet: one line and a hint
├── ConfigError         64     a config file: unknown key, wrong value, missing file
├── DataError           65     a data row, a label outside the set, an unreadable file
├── BaseModelError      66     a base model that cannot be found, read or tuned
├── BrokerError         69     the broker: not reachable, insecure by default
│   └── CredentialsError 77    the broker refused the password or the certificate
├── FingerprintError    67     this device holds another base, tokenizer or task than the run
├── ContainerError      68     a truncated, altered or ill-shaped container
├── ProtocolError       76     a record or a frame that breaks the wire contract
├── StateError          73     a state folder in use, damaged, or of another run
├── MechanismError      78     a mechanism that this party does not have, or a senseless combination
├── MissingExtraError   70     the feature lives in an extra that is not installed
└── TrainerError        71     the trainer process failed, or died and stayed dead
"""

from __future__ import annotations


class EdgeError(Exception):
    """An error to show a user: what happened and was received, and what to do about it.

    Args:
        message: one sentence; names what was received.
        hint: what to do; may be empty where the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(EdgeError):
    exit_code = 64


class DataError(EdgeError):
    exit_code = 65


class BaseModelError(EdgeError):
    exit_code = 66


class FingerprintError(EdgeError):
    exit_code = 67


class ContainerError(EdgeError):
    exit_code = 68


class BrokerError(EdgeError):
    exit_code = 69


class MissingExtraError(EdgeError):
    exit_code = 70


class TrainerError(EdgeError):
    exit_code = 71


class StateError(EdgeError):
    exit_code = 73


class ProtocolError(EdgeError):
    exit_code = 76


class CredentialsError(BrokerError):
    exit_code = 77


class MechanismError(EdgeError):
    exit_code = 78
