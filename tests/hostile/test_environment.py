"""What stands in the environment doesn't lead requests, and the keys in them, elsewhere."""

import asyncio
import json
from pathlib import Path

import httpx2
import pytest

from tests.e2e.proxy import running_proxy
from tests.fakes.upstream import ScriptedUpstream, chat_answer, whole
from tests.hostile.server import running_server
from tests.postgres import Database


async def test_proxies_certificates_and_netrc_of_the_environment_are_not_used(
    database: Database, tmp_path: Path
) -> None:
    caught: list[bytes] = []

    async def trap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caught.append(await reader.read(65536))
        writer.close()

    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password from-netrc\n")
    netrc.chmod(0o600)
    async with ScriptedUpstream() as upstream, await asyncio.start_server(trap, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        environment = dict.fromkeys(names, url) | {"NO_PROXY": "", "no_proxy": "", "NETRC": str(netrc)}
        environment |= {"SSL_CERT_FILE": str(netrc), "SSL_CERT_DIR": str(tmp_path)}
        upstream.will(*whole(chat_answer()))
        (tmp_path / "operator").mkdir()
        async with (
            running_proxy(database, tmp_path / "operator", upstream.base_url) as operator,
            running_server(database, tmp_path, upstream.base_url, environment=environment) as farebox,
            httpx2.AsyncClient(trust_env=False, timeout=30) as http,
        ):
            customer = await operator.account()
            body = json.dumps(customer.body()).encode()
            answer = await http.post(f"{farebox.base_url}/chat/completions", content=body, headers=customer.headers)
    assert answer.status_code == 200
    assert caught == []
    assert "authorization" not in upstream.requests[-1].headers


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("streaming", [False, True])
async def test_no_redirect_of_an_upstream_is_followed(
    database: Database, tmp_path: Path, status: int, streaming: bool
) -> None:
    async with ScriptedUpstream() as elsewhere, ScriptedUpstream() as upstream:
        elsewhere.will(*whole(chat_answer()))
        upstream.will(*whole(b"", status, {"location": f"{elsewhere.base_url}/chat/completions"}))
        async with running_proxy(database, tmp_path, upstream.base_url) as proxy:
            customer = await proxy.account()
            answer = await customer.post(stream=streaming)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_redirect")
            assert "location" not in answer.headers
            [hold] = await customer.ended(1)
            assert hold["state"] == "released"
        assert elsewhere.requests == []
