"""A small server that answers as ComfyUI does to a batch: its "nodes" write a text of what they were given.

As a program, `fake_comfy.py PORT [SECONDS]`, which a job takes. A text that begins with "bad" makes a node fail,
"refused" is not taken.
"""

import asyncio
import hashlib
import json
import sys
import uuid
from contextlib import suppress

from aiohttp import WSMsgType, web

TEXT = ["STRING", {"multiline": True}]
INFO = {
    "Load": {"input": {"required": {"file": [["there.txt"], {"image_upload": True}]}}, "display_name": "Load"},
    "TAVOneShotTune": {
        "input": {
            "required": {"clip": ["IMAGE"], "steps": ["INT", {"min": 1, "max": 500}]},
            "optional": {"validation_prompt": ["TEXT"]},
        },
        "display_name": "One-Shot Tune",
    },
    "Prompt": {"input": {"required": {"text": TEXT}}, "display_name": "Prompt"},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "text": ["TEXT"],
                "seed": ["INT", {"min": 0, "max": 99, "control_after_generate": True}],
                "kind": ["COMBO", {"options": ["plain", "other"]}],
            },
            "optional": {"cfg": ["FLOAT", {}], "exact": ["BOOLEAN", {}]},
        },
        "display_name": "Sample",
    },
}


class Fake:
    def __init__(self, seconds):
        self.seconds = seconds
        self.uploads, self.written, self.history, self.queue, self.sockets = {}, {}, {}, [], {}
        self.stopped = set()

    async def work(self):
        while True:
            if not self.queue:
                await asyncio.sleep(0.005)
                continue
            identity, prompt, client = self.queue[0]
            event, output = "execution_success", {}
            for number, node in prompt.items():
                if node["class_type"] == "Prompt" and node["inputs"]["text"].startswith("bad"):
                    event = "execution_error"
                if node["class_type"] == "Sample":
                    given = [{**other["inputs"]} for other in prompt.values()]
                    given[0]["file"] = self.uploads.get(given[0]["file"], given[0]["file"])
                    told = json.dumps(given).encode()
                    name = f"{hashlib.sha256(told).hexdigest()[:8]}.txt"
                    self.written[name] = told
                    output[number] = {"images": [{"filename": name, "subfolder": "", "type": "output"}]}
            await self.tell(client, "progress", {"prompt_id": identity, "node": "4", "value": 1, "max": 2})
            end = asyncio.get_running_loop().time() + self.seconds
            while asyncio.get_running_loop().time() < end:
                await asyncio.sleep(0.005)
                if identity in self.stopped:
                    event = "execution_interrupted"
                    break
            data = {"prompt_id": identity, "node_type": "Prompt", "exception_message": f"it is {texts_of(prompt)[0]}"}
            self.history[identity] = {"outputs": output, "status": {"messages": [[event, data]]}}
            self.queue.pop(0)
            await self.tell(client, event, data)

    async def tell(self, client, event, data):
        if (socket := self.sockets.get(client)) is not None and not socket.closed:
            with suppress(ConnectionError):  # of a client that was killed
                await socket.send_json({"type": event, "data": data})

    async def prompt(self, request):
        asked = await request.json()
        if "refused" in texts_of(asked["prompt"]):
            return web.json_response({"error": {"message": "not taken"}, "node_errors": {}}, status=400)
        identity = uuid.uuid4().hex
        self.queue.append((identity, asked["prompt"], asked["client_id"]))
        return web.json_response({"prompt_id": identity, "node_errors": {}})

    async def upload(self, request):
        part = (await request.post())["image"]
        self.uploads[part.filename] = part.file.read().decode()
        return web.json_response({"name": part.filename})

    async def socket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        async for message in socket:
            if message.type is WSMsgType.CLOSE:
                break
        return socket

    async def view(self, request):
        return web.Response(body=self.written[request.query["filename"]])

    async def interrupt(self, request):
        self.stopped.add((await request.json())["prompt_id"])
        return web.Response()

    async def asked_queue(self, request):
        if request.method == "POST":
            gone = (await request.json())["delete"]
            self.queue[1:] = [entry for entry in self.queue[1:] if entry[0] not in gone]
            return web.Response()
        return web.json_response({"queue_running": [entry[:1] for entry in self.queue], "queue_pending": []})

    async def asked_history(self, request):
        identity = request.match_info["id"]
        return web.json_response({identity: self.history[identity]} if identity in self.history else {})

    def app(self):
        app = web.Application()
        app.router.add_get("/system_stats", lambda _: answer({}))
        app.router.add_get("/object_info", lambda _: answer(INFO))
        app.router.add_get("/history/{id}", self.asked_history)
        app.router.add_route("*", "/queue", self.asked_queue)
        app.router.add_post("/prompt", self.prompt)
        app.router.add_post("/upload/image", self.upload)
        app.router.add_post("/interrupt", self.interrupt)
        app.router.add_get("/view", self.view)
        app.router.add_get("/ws", self.socket)

        async def begin(_app):
            self.task = asyncio.create_task(self.work())

        app.on_startup.append(begin)
        return app


def texts_of(prompt):
    return [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "Prompt"]


async def answer(value):
    return web.json_response(value)


if __name__ == "__main__":
    port, *seconds = sys.argv[1:]
    web.run_app(Fake(float(seconds[0] if seconds else 0.02)).app(), host="127.0.0.1", port=int(port), print=None)
