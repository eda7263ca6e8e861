# Included by llama.cpp's build (see the Makefile): of the peer we measure its library, not the tools' common code,
# which is half of the time to compile and is switched on by force in llama-cpp-python's own CMakeLists.txt.
set(LLAMA_BUILD_COMMON OFF)
