"""The route table and the application declare the same routes."""

from collections.abc import Iterator
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from service.app import create_app
from service.observability.metrics import ROUTES as METRIC_ROUTES
from service.protocols.registry import PREFIX, by_route
from service.route_table import EXT_PROC, ROUTES
from service.settings import Settings
from tests.support.fakes import fake_bundle

ON_RAY_ONLY = {"/replicas"}


def application() -> FastAPI:
    return create_app(Settings(bundle=Path("unused"), admin=True), fake_bundle())


def served() -> Iterator[tuple[str, set[str]]]:
    """Yield path, without the model's prefix, and methods of every route."""
    for route in iter_route_contexts(application().routes):
        assert route.path is not None, "something is mounted: declare it too"
        yield route.path.removeprefix(PREFIX), set(route.methods or ())


def test_every_route_is_declared_with_its_methods_and_every_declaration_is_served() -> None:
    found: dict[str, set[str]] = {}
    for path, methods in served():
        found.setdefault(path, set()).update(methods)
    assert found.keys() == ROUTES.keys() - ON_RAY_ONLY
    for path, methods in found.items():
        assert methods == set(ROUTES[path].methods), path


def test_the_document_has_the_routes_that_the_table_says() -> None:
    documented = {path for path, route in ROUTES.items() if route.documented}
    assert application().openapi()["paths"].keys() == documented - ON_RAY_ONLY


def test_requests_that_are_classified_or_screened_are_counted() -> None:
    counted = {path for path, route in ROUTES.items() if route.counted}
    assert set(METRIC_ROUTES) == counted | {EXT_PROC}
    assert by_route().keys() < counted
    assert all(ROUTES[path].scope == "classify" for path in counted)


def test_errors_are_in_the_protocol_of_the_route() -> None:
    client = TestClient(application())
    for path in ("/v2", "/v2/models/other", "/v2/models/other/ready"):
        assert client.get(f"/for/other{path}").json().keys() == {"error"}
    assert client.get("/for/other/info").json()["code"] == "unknown_model"


def test_a_slash_too_many_is_not_redirected_to_the_host_that_the_caller_names() -> None:
    client = TestClient(application(), base_url="https://evil.example", follow_redirects=False)
    for path in ROUTES:
        for prefix in ("", "/for/fake"):
            for method in ("GET", "POST"):
                answer = client.request(method, f"{prefix}{path}/")
                assert not answer.is_redirect, path
                assert "evil" not in str(answer.headers), path
