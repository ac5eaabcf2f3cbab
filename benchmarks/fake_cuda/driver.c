/* As much of the CUDA driver as PyTorch asks whether a device has a context. */
#include <stddef.h>

typedef int CUresult;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
CUresult cuDeviceGetCount(int *count) {
  *count = 2;
  return 0;
}
CUresult cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
CUresult cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
CUresult cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "fake";
  return 0;
}
CUresult cuGetErrorName(CUresult error, const char **text) {
  *text = "fake";
  return 0;
}
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *status) {
  *function = NULL;
  return 500;
}
