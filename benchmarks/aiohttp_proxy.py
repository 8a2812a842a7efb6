"""The bare minimum of a Python gateway, to compare with: aiohttp in, aiohttp out, nothing in between."""

import sys

import aiohttp
import uvloop
from aiohttp import web

UPSTREAM = sys.argv[2]


async def forward(request: web.Request) -> web.StreamResponse:
    session: aiohttp.ClientSession = request.app[SESSION]
    async with session.post(
        UPSTREAM + "/chat/completions", data=await request.read(), headers={"Content-Type": "application/json"}
    ) as response:
        if response.content_type == "text/event-stream":
            stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await stream.prepare(request)
            async for part in response.content.iter_any():
                await stream.write(part)
            await stream.write_eof()
            return stream
        return web.Response(body=await response.read(), status=response.status, content_type="application/json")


SESSION = web.AppKey("session", aiohttp.ClientSession)


async def build() -> web.Application:
    app = web.Application()
    app[SESSION] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    app.router.add_post("/v1/chat/completions", forward)
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(build(), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=lambda *_: None)
