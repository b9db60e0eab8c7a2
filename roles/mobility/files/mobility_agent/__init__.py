# SPDX-License-Identifier: GPL-3.0-or-later
"""The mobility agent: a VM keeps its IPv6 home address wherever it runs.

Packages import downwards only: ``daemon`` > ``control`` > ``gateway``, ``anchor`` > ``signalling``,
``datapath`` > ``messages`` > ``errors``, ``durable``, ``config``.
"""

__version__ = "0.1.0"
