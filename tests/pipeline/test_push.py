"""`ctpd export --push` against a stand-in of the hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ctpd_jax.errors import UserError
from ctpd_jax.stages.export import push


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs: repository, preupload, LFS by one request, commit."""

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        self.body()
        self.reply({"id": "me/student", "sha": "0" * 40, "siblings": [], "private": False})

    def do_POST(self):
        hub, body, path = self.server, self.body(), self.path
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self.reply({"error": "You may not"}, 403)
        if path == "/api/repos/create":
            hub.created = json.loads(body)
            return self.reply({"url": f"{hub.url}/me/student", "name": "me/student"})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            large = [
                {**one, "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"} for one in files
            ]
            return self.reply({"files": [{**one, "shouldIgnore": False, "oid": None} for one in large]})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = [{**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in asked]
            return self.reply({"transfer": "basic", "objects": upload})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.lfs[value["oid"]]
            return self.reply({"success": True, "commitUrl": f"{hub.url}/me/student/commit/1", "commitOid": "1" * 40})
        return self.reply({"error": path}, 404)

    def do_PUT(self):
        data = self.body()
        self.server.lfs[hashlib.sha256(data).hexdigest()] = data
        self.reply({})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.lfs, server.tokens, server.created, server.refuses = {}, {}, set(), None, False
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # The library reads its environment when it is imported.
        for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.constants.ENDPOINT"):
            monkeypatch.setattr(name, server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "export").mkdir()
    files = {"README.md": b"---\nlicense: apache-2.0\n---\ncard", "config.json": b"{}", "model.safetensors": b"\0" * 99}
    for name, data in files.items():
        (tmp_path / "export" / name).write_bytes(data)
    return tmp_path / "export", files


def test_the_folder_lies_on_the_hub_as_it_lies_here(hub, folder):
    directory, files = folder
    told: list[str] = []
    push(directory, "me/student", private=True, dry_run=False, say=told.append)
    assert hub.files == files
    assert hub.created["name"] == "student" and hub.created["organization"] == "me"
    assert hub.tokens == {"Bearer hf_secret"} and "secret" not in "".join(told)
    assert told[-1].startswith("pushed: http") and re.search(r"99  model.safetensors", "\n".join(told))


def test_a_dry_run_sends_nothing(hub, folder):
    told: list[str] = []
    push(folder[0], "me/student", private=False, dry_run=True, say=told.append)
    assert len(told) == 4 and "3 files would go to me/student" in told[-1]
    assert not hub.tokens and not hub.files


def test_what_the_hub_refuses_is_a_sentence(hub, folder):
    hub.refuses = True
    with pytest.raises(UserError, match=r"me/student: .*403.* Is HF_TOKEN set"):
        push(folder[0], "me/student", private=False, dry_run=False, say=print)
    with pytest.raises(UserError, match="--push a/b/c"):
        push(folder[0], "a/b/c", private=False, dry_run=True, say=print)
