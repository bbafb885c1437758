"""Surveys: what a model's components do, over whole corpora (docs/survey.md)."""

from __future__ import annotations

from .schema import Problem, Survey, Table

__all__ = ["Problem", "Survey", "Table"]
