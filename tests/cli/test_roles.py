"""What `serve --role` and `route` say to mistakes, before anything is loaded."""

import socket

import pytest


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--role", "decode"], "give --prefill HOST:PORT"),
        (["--role", "prefill"], "give --peer-port 9000"),
        (["--prefill", "127.0.0.1:9000"], "--prefill is for --role decode, not both"),
        (["--role", "prefill", "--peer-port", "0", "--prefill", "a:1"], "--prefill is for --role decode, not prefill"),
        (["--role", "decode", "--prefill", "a:1", "--peer-port", "0"], "--peer-port is for --role prefill, not decode"),
        (["--role", "prefill", "--peer-port", "0", "--peer-host", "0.0.0.0"], "set STALLFREE_PEER_KEY"),
        (["--role", "decode", "--prefill", "127.0.0.1"], "'127.0.0.1' is no address"),
        (["--role", "decode", "--prefill", "a:1,,b:2"], "'' is no address"),
        (["--role", "decode", "--prefill", "a:99999"], "'a:99999' is no address"),
    ],
)
def test_roles_and_addresses_that_cannot_be(stallfree, arguments, says):
    code, _, error = stallfree("serve", "--executor", "simulated", "--port", "0", *arguments)
    assert 1 == code
    assert says in error


def test_a_peer_port_in_use_is_named_with_its_option(stallfree):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, error = stallfree("serve", "--executor", "simulated", "--port", "0", "--role", "prefill", "--peer-port", port)
    assert (1, True) == (code, f"port {port} on 127.0.0.1 is in use; stop what uses it, or give another with --peer-port" in error)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--decode", "nowhere"], "'nowhere' is not a server's URL"),
        (["--decode", "http://a:1", "--prefill", "b"], "--prefill 'b' is no address"),
    ],
)
def test_a_route_to_nowhere(stallfree, arguments, says):
    code, _, error = stallfree("route", "--port", "0", *arguments)
    assert 1 == code
    assert says in error
