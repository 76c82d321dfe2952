"""Requests generated from the live OpenAPI schema: none stops the server, and the schema declares every answer."""

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.server.conftest import Server
from tests.waiting import PATIENCE_S

SERVER = Server(max_model_len=64)
schema = schemathesis.openapi.from_dict(SERVER.app.openapi())


def setup_module():
    SERVER.__enter__()


def teardown_module():
    SERVER.settled()
    SERVER.__exit__()


@schema.parametrize()
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_the_schema_declares(case):
    response = case.call(base_url=SERVER.url, timeout=PATIENCE_S)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    case.validate_response(response, checks=checks)


def test_the_schema_promises_no_422(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    assert [] == [path for path, methods in paths.items() for operation in methods.values() if "422" in operation["responses"]]
