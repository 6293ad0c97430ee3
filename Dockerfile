# Makes an image of this checkout, for NVIDIA GPUs and for TPUs on GKE:
#   docker build --tag=convnext .
#   docker run --gpus=all --volume=/data:/data convnext python train.py --config=configs/imagenet1k.py:tiny …
#   docker build --build-arg=ACCELERATOR=tpu --tag=IMAGE . && docker push IMAGE    # for launch/gke.yaml
# ACCELERATOR is an extra of jax: cuda13 (driver 580 or newer), cuda12 or tpu. The wheels contain CUDA.
FROM python:3.13-slim
ARG ACCELERATOR=cuda13
WORKDIR /convnext
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement=requirements.txt "jax[$ACCELERATOR]" gcsfs google-cloud-storage
COPY . .
CMD ["python", "train.py", "--help"]
