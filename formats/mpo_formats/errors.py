"""The exceptions of the whole project, one tree.

MpoError                  anything that a user can cause and correct
├── FormatError           a `.mpo` file breaks a rule of SPEC.md
├── ConfigError           an option, configuration or request has a value that cannot be honoured
│   └── PlanError         an export plan cannot be carried out on this model
├── CheckpointError       a source model's folder is incomplete, damaged or of an unknown kind
└── OutputError           a result cannot be written

Every message names the thing, what was expected, what was found and the remedy, on one line.
"""

from __future__ import annotations


class MpoError(Exception):
    """The root of all errors that a user's input can cause; its message is shown without a traceback."""


class FormatError(MpoError):
    """A `.mpo` file that is damaged, hostile or of another version."""


class ConfigError(MpoError):
    """An option, configuration value or request that cannot be honoured."""


class PlanError(ConfigError):
    """An export plan that cannot be carried out on this model."""


class CheckpointError(MpoError):
    """A source model that is incomplete, damaged or of an unknown architecture."""


class OutputError(MpoError):
    """A result that cannot be written where it was asked for."""
