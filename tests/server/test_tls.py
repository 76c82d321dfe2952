"""https: a server with a certificate, and the pairs of files that cannot serve."""

import ssl

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from stallfree.server.tls import Tls
from tests.server.conftest import Server
from tests.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    """A folder with `certificate.pem` and its `key.pem`; `encrypted.pem`, the same key; `other.pem`, another; and `ca.pem`."""
    folder = tmp_path_factory.mktemp("pems")
    authority = trustme.CA()
    leaf, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    leaf.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    other.private_key_pem.write_to_path(folder / "other.pem")
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    encrypted = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    (folder / "encrypted.pem").write_bytes(encrypted)
    (folder / "text.pem").write_text("no PEM")
    (folder / "empty.pem").write_text("")
    return folder


def test_a_server_with_a_certificate_answers_by_https_alone(pems):
    tls, trust = Tls.of(pems / "certificate.pem", pems / "key.pem"), ssl.create_default_context(cafile=str(pems / "ca.pem"))
    with Server(tls=tls, verify=trust) as server:
        body = {"prompt": "a", "max_tokens": 3, "stream": True}
        assert server.url.startswith("https://")
        assert server.post("/v1/completions", body).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http"), timeout=PATIENCE_S)


def test_without_files_there_is_no_tls():
    assert Tls.of(None, None) is None


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("certificate.pem", "other.pem", "the key is not the certificate's"),
        ("certificate.pem", "encrypted.pem", "the key is encrypted"),
        (
            "certificate.pem",
            "nowhere.pem",
            "nowhere.pem cannot be read (No such file or directory); name a PEM file with --tls-key",
        ),
        (
            "nowhere.pem",
            "key.pem",
            "nowhere.pem cannot be read (No such file or directory); name a PEM file with --tls-certificate",
        ),
        ("", "key.pem", "cannot be read (Is a directory)"),
        ("text.pem", "key.pem", "they are not a certificate and a private key in PEM"),
        ("certificate.pem", "text.pem", "they are not a certificate and a private key in PEM"),
        ("empty.pem", "empty.pem", "they are not a certificate and a private key in PEM"),
        ("key.pem", "certificate.pem", "they are not a certificate and a private key in PEM"),
    ],
)
def test_a_pair_that_cannot_serve_is_refused_by_both_names_in_one_line(pems, certificate, key, says):
    with pytest.raises(ValueError) as refused:
        Tls.of(pems / certificate, pems / key)
    message = str(refused.value)
    assert message.startswith(f"--tls-certificate {pems / certificate} and --tls-key {pems / key}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(("certificate", "key", "missing"), [("a.pem", None, "--tls-key"), (None, "a.pem", "--tls-certificate")])
def test_half_a_pair_is_refused(certificate, key, missing):
    with pytest.raises(ValueError, match=f"a.pem needs its other half; give {missing} too, or neither"):
        Tls.of(certificate, key)
