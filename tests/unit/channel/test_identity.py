# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may speak: every wrong certificate is refused by a sentence that says what is wrong with it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from precache_proxy.channel import Channel, ChannelConfig, PeerAddress
from precache_proxy.errors import ConfigurationError, PeerRefused, PeerUnreachable
from small_parts.ports import free_port

from .conftest import Authority, Start, make_config, until


def pair_of_configs(authority: Authority) -> tuple[ChannelConfig, ChannelConfig]:
    ports = free_port(), free_port()
    return (
        make_config(authority, "home", ports[0], {"backup": PeerAddress("127.0.0.1", ports[1])}),
        make_config(authority, "backup", ports[1], {"home": PeerAddress("127.0.0.1", ports[0])}),
    )


async def test_expired_certificate(
    authority: Authority, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    home_config, backup_config = pair_of_configs(authority)
    backup_config.certificate_path, backup_config.key_path = authority.issue("backup", expired=True)
    with caplog.at_level(logging.WARNING):
        home, backup = await start(Channel(home_config)), await start(Channel(backup_config))
        await until(lambda: home.links["backup"].state == "refused")
        await until(lambda: backup.links["home"].state == "refused")
        assert "its certificate has expired; renew it" in home.links["backup"].sentence
        assert "refuses our certificate: it has expired" in backup.links["home"].sentence
        await until(lambda: "was turned away: its certificate has expired" in caplog.text)
    with pytest.raises(PeerRefused):
        await home.links["backup"].call("anything", {})


async def test_certificate_of_another_ca(authority: Authority, start: Start, tmp_path: Path) -> None:
    home_config, backup_config = pair_of_configs(authority)
    other = Authority(tmp_path / "other", "another CA")
    backup_config.certificate_path, backup_config.key_path = other.issue("backup")
    home, backup = await start(Channel(home_config)), await start(Channel(backup_config))
    await until(lambda: home.links["backup"].state == "refused")
    assert "its certificate comes from another CA" in home.links["backup"].sentence
    await until(lambda: backup.links["home"].state == "refused")
    assert "CA" in backup.links["home"].sentence


async def test_impostor_with_our_ca_name(authority: Authority, start: Start, tmp_path: Path) -> None:
    """A CA that only bears the same name does not pass."""
    home_config, backup_config = pair_of_configs(authority)
    other = Authority(tmp_path / "other")
    backup_config.certificate_path, backup_config.key_path = other.issue("backup")
    home = await start(Channel(home_config))
    await start(Channel(backup_config))
    await until(lambda: home.links["backup"].state == "refused")
    assert "CA" in home.links["backup"].sentence


async def test_another_name_than_the_configured_one(authority: Authority, start: Start) -> None:
    home_config, backup_config = pair_of_configs(authority)
    backup_config.certificate_path, backup_config.key_path = authority.issue("web1.example")
    home, backup = await start(Channel(home_config)), await start(Channel(backup_config))
    await until(lambda: home.links["backup"].state == "refused")
    assert "is for web1.example, not for backup" in home.links["backup"].sentence
    await until(lambda: backup.links["home"].state == "refused")
    assert "its certificate is for web1.example" in backup.links["home"].sentence


async def test_a_host_that_is_not_among_the_peers(authority: Authority, start: Start) -> None:
    home_config, backup_config = pair_of_configs(authority)
    backup_config.peers = {}
    home = await start(Channel(home_config))
    await start(Channel(backup_config))
    await until(lambda: home.links["backup"].state == "refused")
    assert "home is not among the peers of backup" in home.links["backup"].sentence


async def test_nobody_there_is_down_not_refused(authority: Authority, start: Start) -> None:
    home_config, _ = pair_of_configs(authority)
    home = await start(Channel(home_config))
    await until(lambda: "connection refused" in home.links["backup"].sentence)
    assert (home.links["backup"].state, home.links["backup"].cause) == ("down", "unreachable")
    with pytest.raises(PeerUnreachable, match="is the proxy there running"):
        await home.links["backup"].wait_up(0.1)


async def test_a_renewed_certificate_heals_the_link(authority: Authority, start: Start) -> None:
    home_config, backup_config = pair_of_configs(authority)
    backup_config.certificate_path, backup_config.key_path = authority.issue("backup", expired=True)
    home, backup = await start(Channel(home_config)), await start(Channel(backup_config))
    await until(lambda: home.links["backup"].state == "refused")
    authority.issue("backup")  # the same files
    backup.reload_certificates()
    await home.links["backup"].wait_up(15)
    await backup.links["home"].wait_up(15)


async def test_unusable_certificate_files_are_all_named(authority: Authority, tmp_path: Path) -> None:
    config, _ = pair_of_configs(authority)
    config.ca_path = tmp_path / "no-ca.crt"
    config.key_path = tmp_path / "no.key"
    with pytest.raises(ConfigurationError) as caught:
        await Channel(config).start()
    assert [finding.subject for finding in caught.value.findings] == [
        str(config.ca_path),
        str(config.key_path),
    ]


async def test_a_reload_of_broken_files_keeps_the_old_ones(authority: Authority, start: Start) -> None:
    config, _ = pair_of_configs(authority)
    channel = await start(Channel(config))
    config.key_path.write_text("not a key")
    with pytest.raises(ConfigurationError, match="cannot be used together"):
        channel.reload_certificates()


async def test_port_in_use_is_named(authority: Authority, start: Start) -> None:
    config, other = pair_of_configs(authority)
    await start(Channel(config))
    other.listen_port = config.listen_port
    with pytest.raises(ConfigurationError, match=f"port {config.listen_port}.*cannot listen"):
        await Channel(other).start()


def test_findings_about_peers_come_all_at_once(authority: Authority) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Channel(
            make_config(
                authority,
                "home",
                0,
                {
                    "home": PeerAddress("127.0.0.1"),
                    "b": PeerAddress("", 0),
                    "c": PeerAddress("h", rate_bytes_per_second=0),
                },
            )
        )
    assert [finding.subject for finding in caught.value.findings] == ["peer home", "peer b", "peer c"]
