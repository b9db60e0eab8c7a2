# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mobility agent's control API (HTTP and JSON on a UNIX socket), as modules use it on a host."""

from __future__ import annotations

import typing as t

from ansible_collections.lifeboat.evacuation.plugins.module_utils._client import ProxyClient, ProxyError

DEFAULT_SOCKET = "/run/lifeboat/mobility.sock"


def agent_arguments() -> dict[str, t.Any]:
    """Argument specification shared by modules that ask the agent."""
    return {"socket": {"type": "path", "default": DEFAULT_SOCKET}}


class AgentClient(ProxyClient):
    """Requests to the mobility agent of the host that the module runs on."""

    def request(
        self,
        method: str,
        path: str,
        body: t.Mapping[str, object] | None = None,
        query: t.Mapping[str, object] | None = None,
    ) -> t.Any:
        """The JSON answer to one request. Raises ProxyError, in the agent's words."""
        try:
            return super().request(method, path, body, query)
        except ProxyError as error:
            if error.cause != "proxy-down":
                raise
            raise ProxyError(
                "agent-down",
                f"control socket {self._path}: the mobility agent does not answer; see systemctl status "
                "mobility-agent on this host, or set it up with the role lifeboat.evacuation.mobility",
            ) from error
