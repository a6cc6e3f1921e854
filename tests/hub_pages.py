"""The pages of the loopback Hub of hub_server.py: one method for each kind of request."""

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import Commit, File, Refusal, Repo, User, card_errors

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
EPOCH = "2026-01-01T00:00:00.000Z"


class Pages:
    """Answers to requests, each a JSON value, or (status, body, headers): a mixin of the request handler."""

    hub: Any
    headers: Any
    command: str
    path: str
    query: dict[str, str]
    data: bytes

    # Who asks, and for what.

    def _user(self) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _may_write(self, namespace: str) -> bool:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        mine = namespace == user.name or user.orgs.get(namespace) in ("admin", "write")
        return mine and user.role == "write"

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        namespace = name.removeprefix("datasets/").split("/")[0]
        visible = repo and (not repo.private or (user and (namespace == user.name or namespace in user.orgs)))
        if not visible:
            if user is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not self._may_write(namespace):
            raise Refusal(403, f"You don't have the rights to write to {name}")
        assert repo is not None
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(unquote(revision))
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return commit

    def _route(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                found = answer(self, *match.groups())
                return found if isinstance(found, tuple) else (200, json.dumps(found).encode(), {})
        raise Refusal(404, f"no such page: {path}")

    # Accounts and repositories.

    def whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        token = {"displayName": "test", "role": user.role, "createdAt": EPOCH}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "id": "1", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth}

    def create_repo(self) -> Any:
        asked = json.loads(self.data)
        user = self._user()
        namespace = asked.get("organization") or (user.name if user else "")
        name = f"{namespace}/{asked['name']}"
        if not self._may_write(namespace):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.commit("main", "initial commit", {".gitattributes": File(attributes.encode())})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": "2"}

    def auth_check(self, name: str, write: str | None) -> Any:
        self._repo(name, write=bool(write))
        return {}

    def info(self, name: str, revision: str | None) -> Any:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        siblings = [
            {"rfilename": path, "size": len(file.content), "blobId": file.oid} for path, file in commit.files.items()
        ]
        card = commit.files.get("README.md")
        block = re.match(r"---\n(.*?)\n---\n", card.content.decode(), flags=re.DOTALL) if card else None
        data = yaml.safe_load(block[1]) if block else {}
        about = {"library_name": data.get("library_name"), "tags": data.get("tags", []), "cardData": data or None}
        about |= {"lastModified": EPOCH, "createdAt": EPOCH, "siblings": siblings, "gated": False, "disabled": False}
        name = name.removeprefix("datasets/")
        return {"id": name, "modelId": name, "private": repo.private, "sha": commit.oid, **about}

    def refs(self, name: str) -> Any:
        repo = self._repo(name)
        found = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags), "converts": ("converts", {})}
        return {
            kind: [{"name": key, "ref": f"refs/{ref}/{key}", "targetCommit": oid} for key, oid in names.items()]
            for kind, (ref, names) in found.items()
        }

    def create_ref(self, name: str, kind: str, ref: str) -> Any:
        repo, asked = self._repo(name, write=True), json.loads(self.data or b"{}")
        names = repo.branches if kind == "branch" else repo.tags
        key = unquote(ref) if kind == "branch" else asked["tag"]
        if key.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a {kind}: {key}")
        if key in repo.branches or key in repo.tags:
            raise Refusal(409, f"Reference already exists: {key}")
        start = asked.get("startingPoint", "main") if kind == "branch" else ref
        names[key] = self._commit(repo, start).oid
        return {}

    def commits(self, name: str, revision: str) -> Any:
        repo = self._repo(name)
        commit, found = self._commit(repo, revision), []
        while commit is not None:
            found.append({"id": commit.oid, "title": commit.title, "message": "", "date": EPOCH, "authors": []})
            commit = repo.commits.get(commit.parent or "")
        return found

    # Reading.

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        if file.sha256 is not None:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        return entry

    def tree(self, name: str, revision: str, folder: str | None) -> Any:
        files = self._commit(self._repo(name), revision).files
        prefix = f"{unquote(folder)}/" if folder else ""
        below = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Refusal(404, f"{unquote(folder)} does not exist", "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(below.items()):
            inner = path.removeprefix(prefix).split("/")
            parents = ["/".join(inner[:i]) for i in range(1, len(inner))]
            for parent in (prefix + parent for parent in parents):
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            entries[path] = self._entry(path, file)
        if self.query.get("recursive") != "true":
            entries = {path: e for path, e in entries.items() if "/" not in path.removeprefix(prefix)}
        first, size = int(self.query.get("cursor", 0)), self.hub.page_size
        page, headers = list(entries.values())[first : first + size], {}
        if first + size < len(entries):
            url = f"{self.hub.url}{urlsplit(self.path).path}?recursive={self.query.get('recursive')}"
            headers["Link"] = f'<{url}&cursor={first + size}>; rel="next"'
        return 200, json.dumps(page).encode(), headers

    def paths_info(self, name: str, revision: str) -> Any:
        files = self._commit(self._repo(name), revision).files
        asked = parse_qs(self.data.decode())["paths"]
        return [self._entry(path, files[path]) for path in asked if path in files]

    def resolve(self, name: str, revision: str, path: str) -> Any:
        commit = self._commit(self._repo(name), revision)
        headers, file = {"X-Repo-Commit": commit.oid}, commit.files.get(unquote(path))
        if file is None:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= headers
            raise refusal
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.sha256 is None:  # elsewhere on the same host
            kind = "" if name.startswith("datasets/") else "models/"
            headers["Location"] = f"/api/resolve-cache/{kind}{name}/{commit.oid}/{path}"
            return 307, b"", headers
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        headers["Location"] = f"{self.hub.storage}/storage/{file.sha256}?signature=of-the-day"
        return 302, b"", headers

    def resolve_cache(self, name: str, oid: str, path: str) -> Any:
        file = self._commit(self._repo(name), oid).files[unquote(path)]
        return self._content(file.content, {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"'})

    def stored(self, sha256: str) -> Any:
        self._no_token()
        return self._content(self.hub.objects[sha256], {"ETag": f'"{sha256}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> Any:
        headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD":
            return 200, b"", {**headers, "Content-Length": str(len(content))}
        if not asked:
            return 200, content, headers
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        if first >= len(content):
            refusal = Refusal(416, "Range Not Satisfiable")
            refusal.headers["Content-Range"] = f"bytes */{len(content)}"
            raise refusal
        part = content[first : last + 1]
        return 206, part, {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}

    # Writing.

    def validate_yaml(self) -> Any:
        content = json.loads(self.data)["content"]
        block = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, flags=re.DOTALL)
        warnings, errors = [], []
        if block is None:
            warnings.append("empty or missing yaml metadata in repo card")
        else:
            errors = card_errors(yaml.safe_load(block[1]))
        body = {kind: [{"message": text} for text in texts] for kind, texts in {"warnings": warnings}.items()}
        if errors:
            raise Refusal(400, errors[0], errors=[{"message": text} for text in errors], **body)
        return {"errors": [], **body}

    def preupload(self, name: str, revision: str) -> Any:
        present = self._commit(self._repo(name, write=True), revision).files
        answers = []
        for asked in json.loads(self.data)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            large = path.endswith(LFS_SUFFIXES) or b"\0" in sample or asked["size"] > 10 * 2**20
            known = {"oid": present[path].etag} if path in present else {}
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
        return {"files": answers}

    def lfs_batch(self, name: str) -> Any:
        self._repo(name, write=True)
        asked = json.loads(self.data)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        answers, transfer = [], "basic"
        for item in asked["objects"]:
            sha256, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": sha256, "size": size, "authenticated": True}
            if sha256 not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.storage}/storage/{sha256}"}
                if size > self.hub.part_size:
                    transfer = "multipart"
                    upload["href"] = f"{self.hub.url}/complete/{sha256}"
                    upload["header"] = {"chunk_size": str(self.hub.part_size)}
                    for i in range(-(-size // self.hub.part_size)):
                        upload["header"][f"{i + 1:05d}"] = f"{self.hub.storage}/storage/{sha256}?part={i + 1}"
                verify = {"href": f"{self.hub.url}/verify/{name}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return {"transfer": transfer, "objects": answers}

    def _no_token(self) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")

    def store(self, sha256: str) -> Any:
        self._no_token()
        if "part" in self.query:
            self.hub.parts[sha256, int(self.query["part"])] = self.data
        else:
            self._keep(sha256, self.data)
        return 200, b"", {"ETag": f'"{hashlib.md5(self.data).hexdigest()}"'}

    def _keep(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, "the content is not that of its hash")
        self.hub.objects[sha256] = content
        self.hub.uploaded.append(sha256)

    def complete(self, sha256: str) -> Any:
        content = b""
        for part in json.loads(self.data)["parts"]:
            data = self.hub.parts[sha256, part["partNumber"]]
            assert part["etag"].strip('"') == hashlib.md5(data).hexdigest()
            content += data
        self._keep(sha256, content)
        return {}

    def verify(self, name: str) -> Any:
        self._repo(name, write=True)
        asked = json.loads(self.data)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "the object is not there")
        return {}

    def commit(self, name: str, revision: str) -> Any:
        repo, branch = self._repo(name, write=True), unquote(revision)
        head = self._commit(repo, branch)
        if branch not in repo.branches:
            raise Refusal(400, f"{branch} is not a branch")
        header, *operations = (json.loads(line) for line in self.data.splitlines())
        parent = header["value"].get("parentCommit")
        if parent not in (None, head.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"the object of {path} is not there")
                files[path] = File(self.hub.objects[value["oid"]], value["oid"])
            elif kind == "deletedFile":
                if path not in files:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[path]
            else:
                raise Refusal(400, f"unknown operation {kind}")
        made = repo.commit(branch, header["value"]["summary"], files)
        url = f"{self.hub.url}/{name}/commit/{made.oid}"
        return {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}


_REPO = r"(datasets/[^/]+/[^/]+|(?!datasets/)[^/]+/[^/]+)"  # data sets: as in their URLs
_MODEL = r"/api/(?:models/)?(datasets/[^/]+/[^/]+|(?<=models/)[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", Pages.whoami),
    ("POST", "/api/repos/create", Pages.create_repo),
    ("POST", "/api/validate-yaml", Pages.validate_yaml),
    ("GET", rf"{_MODEL}/auth-check(/write)?", Pages.auth_check),
    ("GET", rf"{_MODEL}(?:/revision/([^/]+))?", Pages.info),
    ("GET", rf"{_MODEL}/refs", Pages.refs),
    ("POST", rf"{_MODEL}/(branch|tag)/([^/]+)", Pages.create_ref),
    ("GET", rf"{_MODEL}/commits/([^/]+)", Pages.commits),
    ("GET", rf"{_MODEL}/tree/([^/]+)(?:/([^/]+))?", Pages.tree),
    ("POST", rf"{_MODEL}/paths-info/([^/]+)", Pages.paths_info),
    ("POST", rf"{_MODEL}/preupload/([^/]+)", Pages.preupload),
    ("POST", rf"{_MODEL}/commit/([^/]+)", Pages.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Pages.lfs_batch),
    ("GET HEAD", rf"/api/resolve-cache/(?:models/)?{_REPO}/([^/]+)/(.+)", Pages.resolve_cache),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", Pages.resolve),
    ("PUT", "/storage/([0-9a-f]{64})", Pages.store),
    ("GET HEAD", "/storage/([0-9a-f]{64})", Pages.stored),
    ("POST", "/complete/([0-9a-f]{64})", Pages.complete),
    ("POST", rf"/verify/{_REPO}", Pages.verify),
]
