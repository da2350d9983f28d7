"""Value tables that several formats share."""

from __future__ import annotations

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of OCP's four-bit float, by code
