// Where CUDA work is queued.
#pragma once

namespace shike {

struct CudaQueue {
    int device;
    void* stream;  // a cudaStream_t of that device
};

}  // namespace shike
