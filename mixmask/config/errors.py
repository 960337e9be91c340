"""Errors that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix; its text is one clear line."""


class ConfigError(UserError, ValueError):
    """A recipe, an override or a setting is wrong; the text names the key, what was found and what was expected."""
