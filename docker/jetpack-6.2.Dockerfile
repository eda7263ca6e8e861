# Tiny-Align on a Jetson Orin with JetPack 6.1 to 6.2.2 (Python 3.10, CUDA 12.6, TensorRT 10.3). See docs/jetson.md.
#
#   docker build -f docker/jetpack-6.2.Dockerfile -t tiny-align:jetpack-6.2 .
#   docker run --rm --runtime nvidia -v "$PWD/bundle:/bundle" tiny-align:jetpack-6.2 doctor --bundle /bundle
#
# Checked by a linter only: it has not been built or run on a board.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

# TensorRT's Python bindings are the system's: PyPI has none for a Jetson.
RUN test -d /usr/lib/python3.10/dist-packages/tensorrt \
    || { echo "the base image has no TensorRT for Python 3.10: choose another BASE" >&2; exit 1; }
RUN python3 -m venv --system-site-packages /opt/tiny-align
ENV PATH=/opt/tiny-align/bin:$PATH

# "trt" runs and builds; "align,trt" trains too, with a PyTorch of its own
ARG EXTRAS=trt
COPY . /src
RUN pip install --no-cache-dir "/src[${EXTRAS}]" && rm -rf /src

ENTRYPOINT ["tiny-align"]
CMD ["doctor"]
