/* As much of the CUDA runtime as device guards, autograd's threads and PyTorch's choice of an attention ask for. The
   devices keep nothing and compute nothing: tensors on them are fake. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int Error;

/* The first fields of cudaDeviceProp, declared here because a wheel of PyTorch brings no headers of CUDA. */
#define FIRST_FIELDS                                                                                                   \
  char name[256], uuid[16], luid[8];                                                                                   \
  unsigned luid_mask;                                                                                                  \
  size_t memory, shared_memory;                                                                                        \
  int registers, warp_size;                                                                                            \
  size_t pitch;                                                                                                        \
  int threads, block[3], grid[3];

/* of CUDA 13 */
struct Properties {
  FIRST_FIELDS
  size_t constants;
  int major, minor;
  size_t texture_alignment, texture_pitch;
  int multiprocessors;
};

/* of CUDA 12 */
struct PropertiesV2 {
  FIRST_FIELDS
  int clock;
  size_t constants;
  int major, minor;
  size_t texture_alignment, texture_pitch;
  int overlap, multiprocessors;
};

#define FILL(properties)                                                                                               \
  strcpy((properties)->name, "NVIDIA H100 80GB HBM3");                                                                 \
  (properties)->memory = 80ull << 30;                                                                                  \
  (properties)->shared_memory = 49152;                                                                                 \
  (properties)->warp_size = 32;                                                                                        \
  (properties)->threads = 1024;                                                                                        \
  (properties)->major = 9;                                                                                             \
  (properties)->minor = 0;                                                                                             \
  (properties)->multiprocessors = 132

static _Thread_local int current;

Error cudaGetDeviceProperties(struct Properties *properties, int device) {
  FILL(properties);
  return 0;
}
Error cudaGetDeviceProperties_v2(struct PropertiesV2 *properties, int device) {
  FILL(properties);
  return 0;
}
Error cudaGetDeviceCount(int *count) {
  const char *set = getenv("FAKE_CUDA_DEVICES");
  *count = set ? atoi(set) : 0;
  return 0;
}
Error cudaGetDevice(int *device) {
  *device = current;
  return 0;
}
Error cudaSetDevice(int device) {
  current = device;
  return 0;
}
Error cudaGetLastError(void) { return 0; }
Error cudaPeekAtLastError(void) { return 0; }
Error cudaDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
Error cudaStreamIsCapturing(void *stream, int *status) {
  *status = 0;
  return 0;
}
Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
Error cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0; /* the compute capability's major number */
  return 0;
}
