"""The commonest service: FastAPI, large uploads, thread pools, streamed answers, work after the answer."""

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
from fastapi import BackgroundTasks, Body, FastAPI, Request
from fastapi.responses import StreamingResponse

import gpuscope

app = FastAPI()
POOL = ThreadPoolExecutor(4)


@gpuscope.stage("preprocess")
def preprocess(body):
    """Numbers of the body."""
    return np.frombuffer(body, np.uint8).astype(np.float32)


@gpuscope.stage("inference")
def infer(numbers):
    """What stands for a model."""
    return float(numbers.mean())


@gpuscope.stage("note")
def note(answer):
    """Work after the answer."""
    return answer


@app.post("/loop")
async def in_the_loop(request: Request):
    """Everything on the loop."""
    return infer(preprocess(await request.body()))


@app.post("/threads")
def in_a_thread_of_the_framework(body: Annotated[bytes, Body()]):
    """In the thread pool of the framework."""
    return infer(preprocess(body))


@app.post("/executor")
async def in_a_pool_of_its_own(request: Request):
    """In a thread pool of the program."""
    import asyncio

    body, loop = await request.body(), asyncio.get_running_loop()
    with gpuscope.stage("predict"):
        numbers = await loop.run_in_executor(POOL, gpuscope.bind(preprocess), body)
        return await loop.run_in_executor(POOL, gpuscope.bind(infer), numbers)


@app.post("/stream")
async def streamed(request: Request):
    """An answer in parts."""
    numbers = preprocess(await request.body())

    @gpuscope.stage("token")
    async def tokens():
        """One part at a time."""
        for part in np.split(numbers, 4):
            yield f"{part.mean()}\n"

    return StreamingResponse(tokens())


@app.post("/background")
async def with_work_after_the_answer(request: Request, tasks: BackgroundTasks):
    """A background task."""
    answer = infer(preprocess(await request.body()))
    tasks.add_task(note, answer)
    return answer
