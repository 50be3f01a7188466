# ray-dmml and Ray, for one machine or for every node of a cluster.
# Built by us with buildah on a stand-in of the base image (Debian 12 and Python 3.12) and PyTorch of PyPI, not yet on the
# base image itself.
#
#   docker build -t ray-dmml:cpu .
#   docker build -t ray-dmml:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#
#   docker run --rm --shm-size=2g ray-dmml:cpu ray-dmml train --out /tmp/run
#   docker run --rm --gpus all --shm-size=8g -v /data:/data -v /runs:/runs ray-dmml:cuda \
#     ray-dmml train --config experiments/configs/cub200.yaml --set data.root=/data/cub200 --out /runs/cub200
#
#   docker run --rm -p 8000:8000 --shm-size=2g -v /runs:/runs -e RAY_DMML_TOKEN ray-dmml:cpu \
#     ray-dmml serve /runs/gallery --host 0.0.0.0
#
# The host needs only the NVIDIA driver and container toolkit, since PyTorch's wheels contain CUDA.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

# KubeRay's health checks need wget. `compile: true` needs g++.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*

# A layer of its own, so that a change of the package does not download PyTorch again.
RUN pip install --index-url "$TORCH_INDEX" torch torchvision

COPY pyproject.toml README.md LICENSE /usr/src/ray-dmml/
COPY ray_dmml /usr/src/ray-dmml/ray_dmml
RUN pip install '/usr/src/ray-dmml[tune,serve,aws]'

RUN useradd --create-home --uid 1000 ray
WORKDIR /home/ray
COPY experiments experiments

# A run needs no root. By number, so that Kubernetes can check it.
USER 1000
CMD ["ray-dmml", "--help"]
