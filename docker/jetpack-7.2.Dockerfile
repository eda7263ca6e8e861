# Tiny-Align on a Jetson Orin with JetPack 7.2 (Python 3.12, CUDA 13.2, TensorRT 10.16). See docs/jetson.md.
#
#   docker build -f docker/jetpack-7.2.Dockerfile -t tiny-align:jetpack-7.2 .
#   docker run --rm --gpus all -v "$PWD/bundle:/bundle" tiny-align:jetpack-7.2 doctor --bundle /bundle
#
# There is no l4t-jetpack image for JetPack 7: NVIDIA's CUDA image is the base, TensorRT comes from the Jetson's own
# repository, in the version that the board has. Checked by a linter only: it has not been built or run on a board.
ARG BASE=nvcr.io/nvidia/cuda:13.2.1-runtime-ubuntu24.04
FROM ${BASE}

# These libraries are for discrete GPUs and would hide the driver that the container is given on a Jetson.
RUN rm -rf /usr/local/cuda/compat

ARG RELEASE=r39.2
ARG TENSORRT=10.16.2.10-1+cuda13.2
ADD https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /usr/share/keyrings/jetson.asc
# hadolint ignore=DL3008
RUN chmod 644 /usr/share/keyrings/jetson.asc \
    && apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-pip python3-venv \
    && echo "deb [signed-by=/usr/share/keyrings/jetson.asc] https://repo.download.nvidia.com/jetson/common ${RELEASE} main" \
        > /etc/apt/sources.list.d/jetson.list \
    && printf 'Package: *nvinfer* *nvonnxparsers*\nPin: origin repo.download.nvidia.com\nPin-Priority: 1001\n' \
        > /etc/apt/preferences.d/jetson \
    && apt-get update \
    && apt-get install --yes --no-install-recommends \
        "libnvinfer10=${TENSORRT}" "libnvinfer-plugin10=${TENSORRT}" "libnvonnxparsers10=${TENSORRT}" \
        "python3-libnvinfer=${TENSORRT}" \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv --system-site-packages /opt/tiny-align
ENV PATH=/opt/tiny-align/bin:$PATH

# "trt" runs and builds; "align,trt" trains too, with a PyTorch of its own
ARG EXTRAS=trt
COPY . /src
RUN pip install --no-cache-dir "/src[${EXTRAS}]" && rm -rf /src

ENTRYPOINT ["tiny-align"]
CMD ["doctor"]
