"""The kernels that collectives through peer memory are made of, in CUDA C++.

Block b of every rank meets block b of every other rank twice: before the first byte is moved (buffers may be read and
written now) and after the last (everything has arrived). A rank says so by writing a number into the others' memory,
with release and acquire semantics at the scope of the system; the number counts the meetings of that block, so flags
are never reset. Who waits looks at a word of the host every now and then, which ends the waiting after a failure.
"""

from __future__ import annotations

THREADS = 512
MOST_RANKS = 16
LINE = 32
"""Flags of a block, 4 bytes each: a line of 128 bytes, one for each rank."""

SOURCE = """
// Defined by who compiles it: THREADS, MOST_RANKS and LINE as above; ELEMENT: bytes of what is summed up; BRAIN:
// whether two bytes are bfloat16; RANKS: how many sum up.
typedef unsigned long long u64;
struct Group { unsigned* flags[MOST_RANKS]; unsigned* epochs; volatile int* abort; int ranks, here, first_block; };
struct Loops { unsigned sizes[4], reads[3], writes[3]; int width, pad; };
struct Copy { const char* from; char* to; Loops loops; };
struct Sum { const char* from[MOST_RANKS]; char* to[MOST_RANKS]; int targets, average; Loops loops; };

static __device__ __forceinline__ void tell(unsigned* flag, unsigned value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(value) : "memory");
}
static __device__ __forceinline__ unsigned told(const unsigned* flag) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
static __device__ void meet(const Group& group, unsigned value) {
    __threadfence_system();
    __syncthreads();
    int peer = threadIdx.x;
    if (peer < group.ranks && peer != group.here) {
        int line = LINE * (group.first_block + blockIdx.x);
        tell(group.flags[peer] + line + group.here, value);
        const unsigned* own = group.flags[group.here] + line + peer;
        unsigned polls = 0;
        while ((int)(told(own) - value) < 0) {
            if ((++polls & 1023u) == 0 && *group.abort) break;
        }
    }
    __syncthreads();
}
static __device__ __forceinline__ unsigned begin(const Group& group) {
    unsigned epoch = group.epochs[group.first_block + blockIdx.x];
    meet(group, epoch + 1);
    return epoch;
}
static __device__ __forceinline__ void end(const Group& group, unsigned epoch) {
    meet(group, epoch + 2);
    if (threadIdx.x == 0) group.epochs[group.first_block + blockIdx.x] = epoch + 2;
}
// Where a thread is in nested loops. It moves on by `step` vectors without dividing.
struct Walk {
    unsigned s1, s2, s3, d0, d1, d2, d3, i0, i1, i2, i3;
    __device__ __forceinline__ Walk(const Loops& loops, unsigned start, unsigned step)
        : s1(loops.sizes[1]), s2(loops.sizes[2]), s3(loops.sizes[3]) {
        i3 = start % s3; start /= s3; i2 = start % s2; start /= s2; i1 = start % s1; i0 = start / s1;
        d3 = step % s3; step /= s3; d2 = step % s2; step /= s2; d1 = step % s1; d0 = step / s1;
    }
    __device__ __forceinline__ void move() {
        i3 += d3; i2 += d2; i1 += d1; i0 += d0;
        if (i3 >= s3) { i3 -= s3; ++i2; }
        if (i2 >= s2) { i2 -= s2; ++i1; }
        if (i1 >= s1) { i1 -= s1; ++i0; }
    }
    __device__ __forceinline__ unsigned at(const unsigned* strides, unsigned width) const {
        return i0 * strides[0] + i1 * strides[1] + i2 * strides[2] + i3 * width;
    }
};
static __device__ __forceinline__ unsigned vectors(const Loops& loops) {
    return loops.sizes[0] * loops.sizes[1] * loops.sizes[2] * loops.sizes[3];
}
template <typename T> static __device__ void copy(const char* from, char* to, const Loops& given) {
    const Loops loops = given;
    unsigned count = vectors(loops), step = gridDim.x * blockDim.x;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    Walk walk(loops, i, step);
    for (; i < count; i += 8 * step) {
        T held[8];
        unsigned target[8];
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (i + k * step < count) {
                held[k] = *(const T*)(from + walk.at(loops.reads, sizeof(T)));
                target[k] = walk.at(loops.writes, sizeof(T));
                walk.move();
            }
        }
        #pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (i + k * step < count) *(T*)(to + target[k]) = held[k];
        }
    }
}
extern "C" __global__ void __launch_bounds__(THREADS) onnxmesh_push(Group group, const Copy* items, int count) {
    unsigned epoch = begin(group);
    for (int n = 0; n < count; ++n) {
        const char* from = items[n].from;
        char* to = items[n].to;
        const Loops& loops = items[n].loops;
        switch (loops.width) {
            case 16: copy<uint4>(from, to, loops); break;
            case 8: copy<uint2>(from, to, loops); break;
            case 4: copy<unsigned>(from, to, loops); break;
            case 2: copy<unsigned short>(from, to, loops); break;
            default: copy<unsigned char>(from, to, loops);
        }
    }
    end(group, epoch);
}
#if ELEMENT == 4
typedef float element;
static __device__ __forceinline__ float load(element x) { return x; }
static __device__ __forceinline__ element store(float x) { return x; }
#elif ELEMENT == 2
typedef unsigned short element;
#if BRAIN
static __device__ __forceinline__ float load(element x) { return __uint_as_float((unsigned)x << 16); }
static __device__ __forceinline__ element store(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (element)((bits >> 16) | 0x40u);
    return (element)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
static __device__ __forceinline__ float load(element x) {
    float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;
}
static __device__ __forceinline__ element store(float x) {
    element y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
}
#endif
#endif
template <int N> struct alignas(N * sizeof(element)) Vector { element x[N]; };
template <int N> static __device__ void sum(const Sum& item) {
    typedef Vector<N> vector;
    const Loops loops = item.loops;
    unsigned count = vectors(loops), step = gridDim.x * blockDim.x;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    Walk walk(loops, i, step);
    for (; i < count; i += 2 * step) {
        vector held[2][RANKS];
        unsigned target[2];
        #pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (i + k * step < count) {
                unsigned at = walk.at(loops.reads, sizeof(vector));
                #pragma unroll
                for (int r = 0; r < RANKS; ++r) held[k][r] = *(const vector*)(item.from[r] + at);
                target[k] = walk.at(loops.writes, sizeof(vector));
                walk.move();
            }
        }
        #pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (i + k * step >= count) break;
            vector result;
            #pragma unroll
            for (int e = 0; e < N; ++e) {
                float total = load(held[k][0].x[e]);
                #pragma unroll
                for (int r = 1; r < RANKS; ++r) total += load(held[k][r].x[e]);
                result.x[e] = store(item.average ? total / RANKS : total);
            }
            for (int t = 0; t < item.targets; ++t) *(vector*)(item.to[t] + target[k]) = result;
        }
    }
}
extern "C" __global__ void __launch_bounds__(THREADS) onnxmesh_sum(Group group, const Sum* items, int count) {
    unsigned epoch = begin(group);
    for (int n = 0; n < count; ++n) {
        const Sum& item = items[n];
        switch (item.loops.width / sizeof(element)) {
#if ELEMENT == 2
            case 8: sum<8>(item); break;
#endif
            case 4: sum<4>(item); break;
            case 2: sum<2>(item); break;
            default: sum<1>(item);
        }
    }
    end(group, epoch);
}
"""
