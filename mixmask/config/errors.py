"""What goes wrong in ways that the person at the keyboard can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the person at the keyboard can mend; its text is one clear line."""


class ConfigError(UserError, ValueError):
    """A recipe, an override or a setting is wrong; the text names the key, what was found and what was expected."""
