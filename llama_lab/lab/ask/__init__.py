"""Asking a trained run: texts, losses, tasks."""
