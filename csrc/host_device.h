// MSN_HD marks what is inline for host and device.
#pragma once

#ifdef __CUDACC__
#define MSN_HD __host__ __device__ __forceinline__
#else
#define MSN_HD inline
#endif
