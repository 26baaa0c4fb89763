# The test phase of the LUMIR challenge: the weights are inside, all else is mounted, and no network is needed.
#
# Put the members (.safetensors with their .json, or .ckpt) into one folder inside this one, then:
#   docker build --build-arg MEMBERS=members -t sitreg-lumir .
#   docker run --rm --network=none --gpus all --user $(id -u):$(id -g) \
#       --mount type=bind,source=$PWD/LUMIR25_dataset.json,target=/app/LUMIR25_dataset.json,readonly \
#       --mount type=bind,source=$PWD/LUMIR,target=/app/input,readonly \
#       --mount type=bind,source=$PWD/output,target=/app/output \
#       sitreg-lumir
# Without --gpus it runs on the CPU. `docker save sitreg-lumir | gzip > sitreg-lumir.tar.gz` makes the file to hand in.

FROM python:3.12-slim

# Triton compiles the GPU kernels at their first launch and needs a C compiler for it.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY constraints.txt /tmp/
# pip's build of torch for Linux runs on NVIDIA GPUs and on CPUs. It is the largest layer, and changes least.
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt torch
COPY pyproject.toml README.md LICENSE /tmp/source/
COPY configs /tmp/source/configs
COPY sitreg_lumir /tmp/source/sitreg_lumir
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt "/tmp/source[train]" && rm -r /tmp/source

ARG MEMBERS=members
COPY ${MEMBERS} /app/members
# Weights that do not load shall end the build and not the challenge; any user may read them.
RUN python -c "from sitreg_lumir.network.weights import load_members; load_members(['/app/members'])" \
    && chmod -R a+rX /app/members \
    && mkdir /app/input /app/output && chmod a+rwx /app/output

# The container may run as a user without a name and a home: what libraries keep on disk goes to /tmp.
ENV HOME=/tmp USER=sitreg LOGNAME=sitreg NUMBA_CACHE_DIR=/tmp/numba TRITON_CACHE_DIR=/tmp/triton \
    XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/mpl PYTHONUNBUFFERED=1

ENTRYPOINT ["sitreg-lumir", "container"]
