"""Certificates: what `fedq certs` makes, and whom a server refuses."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from federation import Federation, federation

from fedq.errors import FieldError
from fedq.network.certs import Identity, Revoked, client_number, load_identity, main, make_certs
from fedq.network.connection import Connection, Lost


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    make_certs(tmp_path / "certs", 2, hosts=["localhost", "127.0.0.1"])
    return tmp_path / "certs"


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_what_is_made(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = _certificate(certs / "authority" / "ca.pem")
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for name, usage in (
        ("server", ExtendedKeyUsageOID.SERVER_AUTH),
        ("client-0", ExtendedKeyUsageOID.CLIENT_AUTH),
        ("client-1", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        folder = certs / name
        own = _certificate(folder / "cert.pem")
        own.verify_directly_issued_by(authority)
        assert list(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert load_identity(folder, serves=name == "server").name == name
    names = _certificate(certs / "server" / "cert.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]
    before = (certs / "client-0" / "cert.pem").read_bytes()
    assert main(["--out", str(certs), "--clients", "3"], "fedq certs") == 0
    assert (certs / "client-2" / "cert.pem").exists()
    assert (certs / "client-0" / "cert.pem").read_bytes() == before
    assert "made" in capsys.readouterr().out
    make_certs(certs, 1, hosts=["localhost"], renew=True)
    assert (certs / "client-0" / "cert.pem").read_bytes() != before


def test_numbers_in_names() -> None:
    assert client_number("client-17") == 17
    for name in ("server", "client-", "client--1", "client-1 ", "client-12345678901", ""):
        assert client_number(name) is None


def test_what_cannot_be_used_is_named(certs: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="the server's folder"):
        load_identity(certs / "client-0", serves=True)
    with pytest.raises(FieldError, match="a client's folder"):
        load_identity(certs / "server", serves=False)
    with pytest.raises(FieldError, match=r"ca\.pem"):
        load_identity(tmp_path / "nowhere", serves=False)
    make_certs(tmp_path / "others", 1, hosts=["localhost"])
    (certs / "client-0" / "ca.pem").write_bytes((tmp_path / "others" / "client-0" / "ca.pem").read_bytes())
    with pytest.raises(FieldError, match="the authority"):
        load_identity(certs / "client-0", serves=False)
    (certs / "client-1" / "key.pem").write_bytes((certs / "server" / "key.pem").read_bytes())
    with pytest.raises(FieldError, match="the key"):
        load_identity(certs / "client-1", serves=False)
    (certs / "client-1" / "cert.pem").write_text("no certificate")
    with pytest.raises(FieldError, match="PEM"):
        load_identity(certs / "client-1", serves=False)
    for options in ({"clients": 0, "days": 1.0}, {"clients": 1, "days": 0.0}):
        with pytest.raises(FieldError):
            make_certs(tmp_path / "more", hosts=[], **options)


def _expired(folder: Path) -> Path:
    """Make certificates whose time is over."""
    make_certs(folder, 1, hosts=["localhost"], days=365)
    import fedq.network.certs as module

    signer = module._load_signer(folder / "authority")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BACKDATED", datetime.timedelta(days=3))
        module._make_member(folder / "client-0", "client-0", [], -1.0, signer)
    return folder


def test_an_expired_certificate_is_named_before_anybody_is_called(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="valid now"):
        load_identity(_expired(tmp_path / "certs") / "client-0", serves=False)


def _read(folder: Path) -> Identity:
    return Identity(*((folder / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")))


def test_an_authority_outlives_what_it_signs_and_is_renewed(tmp_path: Path) -> None:
    certs, day = tmp_path / "certs", datetime.timedelta(days=1)
    make_certs(certs, 2, hosts=["localhost"], days=10)
    first, old = _certificate(certs / "authority" / "ca.pem"), _certificate(certs / "client-1" / "cert.pem")
    assert first.not_valid_after_utc - old.not_valid_after_utc > 89 * day
    assert make_certs(certs, 3, hosts=["localhost"], days=90) == [certs / "client-2"]  # it lasts for these
    assert _certificate(certs / "client-2" / "ca.pem") == first
    assert certs / "authority" in make_certs(certs, 4, hosts=["localhost"], days=200)
    second = _certificate(certs / "authority" / "ca.pem")
    assert second.not_valid_after_utc - first.not_valid_after_utc > 1800 * day
    assert second.public_key() == first.public_key()
    for number in range(4):  # those that were there are as good as before, under either
        assert _certificate(certs / f"client-{number}" / "ca.pem") == second
        assert load_identity(certs / f"client-{number}", serves=False).name == f"client-{number}"
    for authority in (first, second):
        old.verify_directly_issued_by(authority)
        _certificate(certs / "server" / "cert.pem").verify_directly_issued_by(authority)
    assert make_certs(certs, 1, hosts=["localhost"], days=10, renew=True)[0] == certs / "authority"


def test_an_authority_that_has_expired_is_renewed(tmp_path: Path) -> None:
    import fedq.network.certs as module

    certs = tmp_path / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BACKDATED", datetime.timedelta(days=3000))
        patch.setattr(module, "_OUTLIVES", -1)
        make_certs(certs, 1, hosts=["localhost"], days=10)
    with pytest.raises(FieldError, match=r"ca\.pem.*valid now"):
        load_identity(certs / "client-0", serves=False)
    make_certs(certs, 1, hosts=["localhost"], days=10)
    assert load_identity(certs / "client-0", serves=False).name == "client-0"
    assert load_identity(certs / "server", serves=True).name == "server"


def test_all_that_a_client_has_had_is_revoked(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    revoked = Revoked(certs / "server")
    first = (certs / "client-1" / "cert.pem").read_bytes()
    assert not revoked.has(first)
    make_certs(certs, 2, hosts=["localhost"], renew=True)
    second, other = ((certs / f"client-{number}" / "cert.pem").read_bytes() for number in (1, 0))
    assert main(["--out", str(certs), "--revoke", "1"], "fedq certs") == 0
    assert "revoked.txt" in capsys.readouterr().out
    third = (certs / "client-1" / "cert.pem").read_bytes()
    assert [revoked.has(one) for one in (first, second, third, other)] == [True, True, False, False]
    assert load_identity(certs / "client-1", serves=False).name == "client-1"
    main(["--out", str(certs), "--revoke", "1", "--revoke", "0"], "fedq certs")
    assert [revoked.has(one) for one in (first, second, third, other)] == [True] * 4
    with pytest.raises(FieldError, match="revoke=7"):
        main(["--out", str(certs), "--revoke", "7"], "fedq certs")


def test_a_server_refuses_a_revoked_certificate_without_a_restart(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    make_certs(certs, 2, hosts=["localhost"])
    old = _read(certs / "client-0")
    with federation(tmp_path) as fed:
        server = fed.server("--clients", "2", "--rounds", "1", trust=("--certs", str(certs / "server")))
        server.until_it_says("listening")
        _describe(fed, old)
        main(["--out", str(certs), "--revoke", "0"], "fedq certs")
        with pytest.raises(FieldError, match="client 0 is revoked"):
            _describe(fed, old)
        trusts = [("--certs", str(certs / f"client-{number}")) for number in range(2)]
        clients = [fed.client(number, trust=trust) for number, trust in enumerate(trusts)]
        server.ends_well()
        for client in clients:
            client.ends_well()


@pytest.mark.slow
def test_a_server_refuses_whom_it_does_not_know(tmp_path: Path) -> None:
    certs = _expired(tmp_path / "certs")
    make_certs(tmp_path / "others", 1, hosts=["localhost"])
    make_certs(certs, 2, hosts=["localhost"])
    ours, theirs = _read(certs / "client-1"), _read(tmp_path / "others" / "client-0")
    with federation(tmp_path) as fed:
        server = fed.server("--clients", "2", "--rounds", "1", trust=("--certs", str(certs / "server")))
        server.until_it_says("listening")
        _check_refusals(fed, certs, ours, theirs)
        connection = Connection(fed.address, ours, 1)
        assert connection.describe()["number"] == 1  # and this one it knows, by its certificate
        connection.close()
        server.kill()


def _check_refusals(fed: Federation, certs: Path, ours: Identity, theirs: Identity) -> None:
    stranger = Identity(ours.authority, theirs.certificate, theirs.key)
    expired, of_server = _read(certs / "client-0"), _read(certs / "server")
    for name, identity in (("stranger", stranger), ("expired", expired)):
        with pytest.raises((Lost, FieldError)) as caught:
            _describe(fed, identity)
        assert "number" not in str(caught.value), name
    with pytest.raises((Lost, FieldError)):  # a server's certificate is no client's
        _describe(fed, of_server)
    with pytest.raises(FieldError, match="authority"):  # and a client does not talk to a server that it does not know
        _describe(fed, theirs)
    channel = grpc.insecure_channel(fed.address)
    with pytest.raises(grpc.RpcError):
        channel.unary_unary("/fedq.Federation/Describe")(b"", timeout=5)
    channel.close()


def _describe(fed: Federation, identity: Identity) -> None:
    connection = Connection(fed.address, identity, 0)
    try:
        connection.describe()
    finally:
        connection.close()
