"""Certificates for a federation: one authority, a server, and one for each client, each in a folder to hand out.

Made with the library `cryptography`: ECDSA on P-256, X.509 v3, a server's key good for serving alone and a client's for
being a client alone. Whoever has the authority's folder can make more; nobody else needs it.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedq.errors import FieldError
from fedq.files import replace_file, writable

_BACKDATED = datetime.timedelta(hours=1)
"""Clocks of other machines may be slow."""
_AUTHORITY = "fedq federation"
_MOST_DAYS = 36_500
_OUTLIVES = 10
"""Times the days of a certificate that the authority which signs it lasts, where it is made or renewed."""
_ISSUED, REVOKED = "issued.txt", "revoked.txt"
"""Serial numbers with names, a line each: of all that an authority has signed, and of those that a server refuses."""
_CLIENT = re.compile(r"client-(\d{1,9})")


@dataclass(frozen=True)
class Identity:
    """Who somebody is, as three PEM texts.

    Args:
        authority: The authority's certificate, which both sides trust.
        certificate: This party's own certificate.
        key: The private key of that certificate.
    """

    authority: bytes
    certificate: bytes
    key: bytes

    @property
    def name(self) -> str:
        """Common name in the certificate: ``server`` or ``client-3``."""
        return _common_name(x509.load_pem_x509_certificate(self.certificate))


def main(argv: Sequence[str], program: str) -> int:
    """Make certificates for a server and its clients: `fedq certs --clients 10 --host server.example.org`."""
    parser = argparse.ArgumentParser(prog=program, description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("certs"), help="where the folders go (default: certs)")
    parser.add_argument("--clients", type=int, default=2, help="clients, numbered from 0 (default: 2)")
    parser.add_argument(
        "--host", action="append", help="a name or address by which clients reach the server; may be given again"
    )
    parser.add_argument("--days", type=float, default=365.0, help="days until the certificates expire (default: 365)")
    parser.add_argument(
        "--renew", action="store_true", help="replace certificates that are there; the authority keeps its key"
    )
    parser.add_argument(
        "--revoke",
        type=int,
        action="append",
        metavar="N",
        help="refuse all certificates that client N has had, and make a new one; may be given again",
    )
    given = parser.parse_args(argv)
    made = make_certs(
        given.out, given.clients, hosts=given.host or ["localhost", "127.0.0.1"], days=given.days, renew=given.renew
    )
    made += [revoke(given.out, number, days=given.days) for number in given.revoke or []]
    print("\n".join(f"made {folder}" for folder in made) or f"{given.out} has them all; --renew replaces them")
    if given.revoke:
        print(f"Put {given.out}/server/{REVOKED} into the server's folder; it is read again without a restart.")
    print(
        f"Give {given.out}/server to the server, each {given.out}/client-N to one client; keep {given.out}/authority."
    )
    return 0


def make_certs(
    out: Path, clients: int, *, hosts: Sequence[str], days: float = 365.0, renew: bool = False
) -> list[Path]:
    """Make what is missing: the authority, the server, ``clients`` clients. Each in a folder under ``out``.

    The authority lasts ten times as long as what it signs. It is renewed where it would not outlive that, with its name
    and key, so that certificates and copies of ``ca.pem`` that are elsewhere stay good for as long as they say.

    Args:
        out: Folder of all certificates; an authority that is there is gone on with.
        clients: Number of clients; their folders are client-0, client-1 and so on.
        hosts: Host names and addresses in the server's certificate.
        days: Days from now for which the certificates are valid.
        renew: Whether to replace certificates that are there; the authority keeps its key.

    Returns:
        The folders written.

    Raises:
        FieldError: A number that makes no sense, or a folder that cannot be written.
    """
    if not 1 <= clients <= 100_000:
        raise FieldError("clients", clients, "1 to 100000")
    if not 0 < days <= _MOST_DAYS:
        raise FieldError("days", days, f"above 0 and at most {_MOST_DAYS}")
    authority = out / "authority"
    made = [] if _lasts(authority, days) and not renew else [_make_authority(authority, days)]
    signer = _load_signer(authority)
    for folder in sorted({path.parent for path in out.glob("*/ca.pem")} - {authority}) if made else []:
        _write(folder, {"ca.pem": _pem(signer.certificate)})
    people = [("server", hosts)] + [(f"client-{number}", []) for number in range(clients)]
    for name, names in people:
        if renew or not (out / name / "cert.pem").exists():
            made.append(_make_member(out / name, name, names, days, signer))
    return made


def revoke(out: Path, number: int, *, days: float = 365.0) -> Path:
    """Add all certificates that a client has had to the server's list, and make it a new one.

    Args:
        out: Folder of all certificates, as for `make_certs`.
        number: The client's number, from 0.
        days: Days from now for which the new certificate is valid.

    Returns:
        The client's folder.

    Raises:
        FieldError: There is no such client.
    """
    name, authority = f"client-{number}", out / "authority"
    if not (out / name / "cert.pem").exists():
        raise FieldError("revoke", number, f"the number of a client whose folder is in {out}")
    now = x509.load_pem_x509_certificate(_read(out / name / "cert.pem"))
    serials = {serial for serial, owner in _lines(authority / _ISSUED) if owner == name} | {f"{now.serial_number:x}"}
    _add_lines(out / "server" / REVOKED, [(serial, name) for serial in sorted(serials)])
    return _make_member(out / name, name, [], days, _load_signer(authority))


class Revoked:
    """The certificates that a server refuses; its list is read again whenever it has changed.

    Args:
        folder: The server's folder of certificates, where the list is.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / REVOKED
        self._seen: tuple[int, int] | None = None
        self._serials: frozenset[str] = frozenset()

    def has(self, certificate: bytes) -> bool:
        """Say whether a certificate, in PEM, is among them."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        if self._seen != (found.st_mtime_ns, found.st_size):
            self._serials = frozenset(serial for serial, _ in _lines(self._path))
            self._seen = found.st_mtime_ns, found.st_size
        return _serial(certificate) in self._serials


@lru_cache(1024)
def _serial(certificate: bytes) -> str:
    return f"{x509.load_pem_x509_certificate(certificate).serial_number:x}"


def _lines(path: Path) -> list[tuple[str, str]]:
    """Return the serial numbers and names of a list; none where there is no list."""
    if not path.exists():
        return []
    words = (line.split() for line in _read(path).decode(errors="replace").splitlines())
    return [(pair[0], pair[1]) for pair in words if len(pair) >= 2]


def _add_lines(path: Path, lines: Sequence[tuple[str, str]]) -> None:
    kept = dict.fromkeys([*_lines(path), *lines])
    with writable("out", path.parent):
        replace_file(path, "".join(f"{serial} {name}\n" for serial, name in kept).encode())


def load_identity(folder: Path, *, serves: bool) -> Identity:
    """Read a folder that `make_certs` made, and check what the other side would refuse without saying why.

    Raises:
        FieldError: A file is missing, the certificate has expired or is not valid yet, is not the authority's, not the
            key's, or of another kind.
    """
    files = [_read(folder / file) for file in ("ca.pem", "cert.pem", "key.pem")]
    identity = Identity(*files)
    try:
        authority, own = (x509.load_pem_x509_certificate(pem) for pem in (identity.authority, identity.certificate))
        key = serialization.load_pem_private_key(identity.key, None)
    except ValueError as error:
        raise FieldError("certs", str(folder), f"a folder of PEM files ({error})") from None
    now = datetime.datetime.now(datetime.timezone.utc)
    for name, one in (("cert.pem", own), ("ca.pem", authority)):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            valid = f"{one.not_valid_before_utc:%Y-%m-%d %H:%M} to {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise FieldError("certs", str(folder / name), f"a certificate that is valid now, not only from {valid}")
    try:
        own.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise FieldError("certs", str(folder), "a certificate that the authority in ca.pem has signed") from None
    if own.public_key() != key.public_key():
        raise FieldError("certs", str(folder), "the key that belongs to the certificate")
    is_server = _common_name(own) == "server"
    if is_server != serves:
        kind = "the server's folder" if serves else "a client's folder"
        raise FieldError("certs", str(folder), f"{kind}; this one is for {_common_name(own)}")
    return identity


def client_number(name: str) -> int | None:
    """Return the number in a client's common name; None if it is no client's."""
    match = _CLIENT.fullmatch(name)
    return int(match[1]) if match else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FieldError("certs", str(path), f"a file that can be read ({error.strerror})") from None


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


@dataclass(frozen=True)
class _Signer:
    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _load_signer(folder: Path) -> _Signer:
    certificate = x509.load_pem_x509_certificate(_read(folder / "ca.pem"))
    key = serialization.load_pem_private_key(_read(folder / "key.pem"), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FieldError("certs", str(folder), "an authority that `fedq certs` made")
    return _Signer(folder, certificate, key)


def _lasts(authority: Path, days: float) -> bool:
    """Whether there is an authority that outlives what it signs now."""
    if not (authority / "key.pem").exists():
        return False
    now = datetime.datetime.now(datetime.timezone.utc)
    return _load_signer(authority).certificate.not_valid_after_utc >= now + datetime.timedelta(days=days)


def _make_authority(folder: Path, days: float) -> Path:
    """Make an authority, or renew the one that is there."""
    has_key = (folder / "key.pem").exists()
    key = _load_signer(folder).key if has_key else ec.generate_private_key(ec.SECP256R1())
    name = _name(_AUTHORITY)
    builder = (
        _builder(name, name, key, min(_OUTLIVES * days, _MOST_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    certificate = builder.sign(key, hashes.SHA256())
    _write(folder, {"ca.pem": _pem(certificate), "key.pem": _key_pem(key)})
    return folder


def _make_member(folder: Path, name: str, hosts: Sequence[str], days: float, signer: _Signer) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if name == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    alternatives = x509.SubjectAlternativeName([_host(host) for host in hosts] or [x509.DNSName(name)])
    builder = (
        _builder(_name(name), signer.certificate.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()),
            critical=False,
        )
    )
    certificate = builder.sign(signer.key, hashes.SHA256())
    _add_lines(signer.folder / _ISSUED, [(f"{certificate.serial_number:x}", name)])
    _write(folder, {"ca.pem": _pem(signer.certificate), "cert.pem": _pem(certificate), "key.pem": _key_pem(key)})
    return folder


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write PEM files; keys can be read by their owner alone, from the first moment."""
    with writable("out", folder):
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        for name, data in files.items():
            replace_file(folder / name, data)
            os.chmod(folder / name, 0o600 if name == "key.pem" else 0o644)
