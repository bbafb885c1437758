"""What a survey shows: each analysis is a function of a Survey and gives a Finding.

`importance` and `frequency` (components.py), `head_roles` (roles.py), `bypass` (bypass.py),
`parts_of_speech` and `function_words` (words.py), `domains` and `contrast` (domains.py). The unit
of every interval and test is the document (statistics.py, units.py).
"""

from __future__ import annotations

from .bypass import bypass
from .components import frequency, importance
from .domains import contrast, domains
from .finding import Finding, NotApplicableError
from .roles import Rule, head_roles
from .words import function_words, parts_of_speech

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
