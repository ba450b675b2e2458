# An image of kd_jax. EXTRA is empty for CPUs, cuda for NVIDIA GPUs, tpu for TPUs:
#   docker build --build-arg EXTRA=cuda -t REGISTRY/kd_jax:cuda .
#   docker run --rm --gpus all -v "$PWD/runs:/runs" REGISTRY/kd_jax:cuda kd-jax train --config gmm --workdir /runs/gmm
# CUDA and cuDNN come with the wheels: a GPU's host needs only its driver and the NVIDIA container toolkit.
FROM python:3.12-slim
ARG EXTRA=""
WORKDIR /kd_jax
COPY pyproject.toml setup.py requirements.txt README.md LICENSE ./
COPY kd_jax kd_jax
COPY configs configs
RUN pip install --no-cache-dir ".${EXTRA:+[$EXTRA]}"
# so that any user (docker run --user, Kubernetes) has a home to write to, and with it a cache
RUN mkdir --mode=1777 /home/any
ENV HOME=/home/any
CMD ["kd-jax", "--help"]
