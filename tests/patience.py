"""Hypothesis on machines that are busy with something else: slow is not wrong."""

from hypothesis import HealthCheck, settings

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
