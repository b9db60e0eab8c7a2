# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host's libvirt, as modules use it: one guarded import, one connection, VMs by name or UUID."""

from __future__ import annotations

import traceback
import typing as t

from ansible.module_utils.basic import missing_required_lib

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

try:
    import libvirt
except ImportError:
    libvirt = None
    _IMPORT_ERROR = traceback.format_exc()
else:
    _IMPORT_ERROR = ""


class LibvirtFailed(Exception):
    """libvirt refused, or has no such VM; the sentence says which."""


def libvirt_arguments() -> dict[str, t.Any]:
    """Argument specification shared by modules that ask libvirt."""
    return {"libvirt_uri": {"type": "str", "default": "qemu:///system"}}


class Hypervisor:
    """A connection to libvirt. Raises LibvirtFailed."""

    def __init__(self, module: AnsibleModule, *, read_only: bool) -> None:
        if libvirt is None:
            module.fail_json(msg=missing_required_lib("libvirt-python"), exception=_IMPORT_ERROR)
        self.libvirt: t.Any = libvirt
        # It would print what it also raises.
        libvirt.registerErrorHandler(lambda *_words: None, None)
        uri = module.params["libvirt_uri"]
        try:
            self._connection = libvirt.openReadOnly(uri) if read_only else libvirt.open(uri)
        except libvirt.libvirtError as error:
            raise LibvirtFailed(
                f"libvirt at {uri}: does not answer ({error}); see `virsh -c {uri} list`"
            ) from error

    def domains(self) -> list[t.Any]:
        """Every VM that is defined or runs here."""
        domains: list[t.Any] = self._connection.listAllDomains()
        return domains

    def domain(self, vm: str) -> t.Any:
        """The VM of that name or UUID. Raises LibvirtFailed."""
        for domain in self.domains():
            if vm in {domain.name(), domain.UUIDString()}:
                return domain
        raise LibvirtFailed(
            f"VM {vm}: libvirt of this host knows none of that name or UUID; see `virsh list --all`"
        )

    def definition(self, domain: t.Any) -> str:
        """What holds when it starts next; what runs, of one that is nowhere else."""
        flags = self.libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() else 0
        return str(domain.XMLDesc(flags))
