"""Certificates that TLS accepts only from the right authority, and keys that Flower and OpenSSH can read."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from experiments.deploy.demo import OPTIONS
from experiments.deploy.network import write_node_key, write_private, write_server_credentials
from tapfl.config import RunConfig
from tapfl.personalize.methods import never_begins


def handshake(server: Path, authority: Path, host: str) -> str:
    """Returns the protocol of a TLS connection to the server with these credentials, checked as Python's clients do."""
    ours, theirs = socket.socketpair()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(server / "server.crt", server / "server.key")

    def answer() -> None:
        try:
            serving.wrap_socket(theirs, server_side=True)
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=str(authority))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        with context.wrap_socket(ours, server_hostname=host) as connection:
            return str(connection.version())
    finally:
        ours.close()
        thread.join(10)


def test_a_server_is_verified_by_its_names_and_its_authority(tmp_path: Path) -> None:
    server = tmp_path / "server"
    authority = write_server_credentials(server, ["127.0.0.1", "superlink.example"])
    assert handshake(server, authority, "127.0.0.1") == "TLSv1.3"
    assert handshake(server, authority, "superlink.example") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match=r"doesn't match|not valid for"):
        handshake(server, authority, "elsewhere.example")
    stranger = write_server_credentials(tmp_path / "stranger", ["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, stranger, "127.0.0.1")


def test_a_nodes_keys_belong_together_and_are_of_the_kind_that_flower_takes(tmp_path: Path) -> None:
    private, public = write_node_key(tmp_path)
    key = load_ssh_private_key(private.read_bytes(), None)
    announced = load_ssh_public_key(public.read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(announced, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(announced) and announced.curve.name == "secp384r1"
    assert public_key_to_bytes(key.public_key()) == public_key_to_bytes(announced)
    assert public.read_bytes().startswith(b"ecdsa-sha2-nistp384 ")
    assert write_node_key(tmp_path / "other")[1].read_bytes() != public.read_bytes()


def test_only_the_owner_reads_them_and_none_is_overwritten(tmp_path: Path) -> None:
    key = tmp_path / "server.key"
    files = [write_server_credentials(tmp_path, ["localhost"]), tmp_path / "server.crt", key, *write_node_key(tmp_path)]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    with pytest.raises(FileExistsError):
        write_private(key, b"")
    assert len(key.read_bytes()) > 100


def test_the_options_of_the_demo_are_valid_and_nodes_have_a_state_to_store() -> None:
    assert not never_begins(RunConfig.from_flat(OPTIONS))
