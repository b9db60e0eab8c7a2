# SPDX-License-Identifier: GPL-3.0-or-later
"""Moving a running VM: the job at its source and the arrival at its destination."""
