"""Analyses of surveys: each is a function of a Survey and returns a Finding.

`importance` and `frequency` are in components.py, `head_roles` in roles.py, and `bypass`,
`parts_of_speech`, `function_words`, `domains` and `contrast` in the files of these names. The unit
of every interval and test is the document (intervals.py, units.py).
"""

from __future__ import annotations

from .bypass import bypass
from .components import frequency, importance
from .contrast import contrast
from .domains import domains
from .finding import Finding, NotApplicableError
from .function_words import function_words
from .parts_of_speech import parts_of_speech
from .roles import Rule, head_roles

__all__ = [
    "Finding",
    "NotApplicableError",
    "Rule",
    "bypass",
    "contrast",
    "domains",
    "frequency",
    "function_words",
    "head_roles",
    "importance",
    "parts_of_speech",
]
