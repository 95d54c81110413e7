# Read by CMake right after llama.cpp's project(). llama-cpp-python's CMakeLists.txt forces this library on,
# nothing in its wheel links to it, and it is 40 % of the build.
set(LLAMA_BUILD_COMMON OFF)
